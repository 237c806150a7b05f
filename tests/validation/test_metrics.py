from __future__ import annotations

import subprocess
import sys
import types
import unicodedata

import numpy as np
import pytest
import sacrebleu

from cvmk.errors import ConfigError, DataError
from cvmk.validation import metrics

REAL = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf, "ter": sacrebleu.corpus_ter}


@pytest.fixture
def without(monkeypatch):
    """A function that makes packages look uninstalled."""

    def hide(*packages):
        for package in packages:
            for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
                monkeypatch.delitem(sys.modules, name)
            monkeypatch.setitem(sys.modules, package, None)
        metrics._bert_scorer.cache_clear()

    yield hide
    metrics._bert_scorer.cache_clear()


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter"])
def test_sacrebleu_is_taken_where_it_is_installed(metric, hypotheses, references):
    score = metrics.score(metric, hypotheses, references)
    assert score.value == REAL[metric](hypotheses, [references]).score
    assert not score.fallback
    assert score.signature.endswith(f"version:{sacrebleu.__version__}")
    assert score.label == {"bleu": "BLEU", "chrf": "chrF2", "ter": "TER"}[metric]


def test_bleu_is_cased_and_tokenised_by_13a(hypotheses, references):
    assert metrics.score("bleu", hypotheses, references).signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert metrics.score("bleu", ["ein hund bellt sehr laut"], ["Ein Hund bellt sehr laut"]).value < 50


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter"])
def test_fallback_agrees_and_says_what_it_is(metric, hypotheses, references, without):
    real = metrics.score(metric, hypotheses, references)
    without("sacrebleu")
    stand_in = metrics.score(metric, hypotheses, references)
    assert stand_in.value == pytest.approx(real.value, abs=1e-9)
    assert stand_in.fallback and stand_in.signature.startswith("cvmk-fallback|")
    assert stand_in.label.endswith("(fallback)")
    # The variant is described as sacrebleu describes it.
    assert stand_in.signature.removeprefix("cvmk-fallback|").rsplit("|", 1)[0] == real.signature.rsplit("|", 1)[0]


def test_rouge_real_and_fallback(hypotheses, references, without):
    pytest.importorskip("rouge_score", reason="the package rouge-score is not installed")
    real = metrics.score("rouge", hypotheses, references)
    assert not real.fallback and real.signature.startswith("rouge-score|") and "rougeL" in real.signature
    without("rouge_score")
    stand_in = metrics.score("rouge", hypotheses, references)
    assert stand_in.value == pytest.approx(real.value, abs=1e-9)
    assert stand_in.signature.startswith("cvmk-fallback|")


def test_bertscore_fallback_is_labelled(hypotheses, references, without):
    without("bert_score")
    score = metrics.score("bertscore", hypotheses, references)
    assert score.fallback
    assert score.signature.startswith("cvmk-fallback|bertscore-fallback|")
    assert score.label == "BERTScore (fallback)"


class FakeTensor:
    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values


def fake_bert_score(monkeypatch, error=None):
    asked = []

    class BERTScorer:
        hash = "some-model_L9_no-idf_version=0.3"

        def __init__(self, model_type):
            asked.append(model_type)
            if error:
                raise error

        def score(self, candidates, references):
            assert all(isinstance(group, list) for group in references)
            return None, None, FakeTensor([0.5 + 0.25 * (text in group) for text, group in zip(candidates, references, strict=True)])

    module = types.ModuleType("bert_score")
    module.BERTScorer = BERTScorer
    monkeypatch.setitem(sys.modules, "bert_score", module)
    return asked


def test_bert_score_is_taken_where_its_model_loads(monkeypatch, without):
    without("bert_score")
    monkeypatch.setenv("CVMK_BERTSCORE_MODEL", "some-model")
    asked = fake_bert_score(monkeypatch)
    for _ in range(2):
        measured = metrics.measure("bertscore", ["a", "b"], [["a", "x"], ["c", "y"]])
        assert measured.score.value == pytest.approx(62.5)
        assert not measured.score.fallback
        assert measured.score.signature == "bert-score|nrefs:2|f1|some-model_L9_no-idf_version=0.3"
        assert float(measured.combine(measured.statistics.sum(axis=0))) == pytest.approx(62.5)
    assert asked == ["some-model"], "the model is loaded once"


def test_bert_score_whose_model_does_not_load_falls_back(monkeypatch, without):
    without("bert_score")
    asked = fake_bert_score(monkeypatch, OSError("no such model and no network"))
    for _ in range(2):
        assert metrics.score("bertscore", ["a"], ["a"]).fallback
    assert asked == [metrics.BERTSCORE_MODEL], "the failure is remembered"


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_statistics_add_up_to_the_score(metric, hypotheses, references):
    measured = metrics.measure(metric, hypotheses, references)
    assert measured.statistics.shape[0] == len(references)
    assert measured.statistics.dtype == np.float64
    assert float(measured.combine(measured.statistics.sum(axis=0))) == pytest.approx(measured.score.value, abs=1e-9)


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_several_reference_sets(metric, hypotheses, worse_hypotheses, references):
    one, two = metrics.score(metric, hypotheses, worse_hypotheses), metrics.score(metric, hypotheses, [worse_hypotheses, references])
    assert (two.value - one.value) * metrics.good_direction(metric) > 0
    assert "nrefs:2" in two.signature


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_perfect_and_hopeless(metric, references):
    assert metrics.score(metric, references, references).value == pytest.approx(0 if metric == "ter" else 100)
    empty = metrics.score(metric, [""] * len(references), references).value
    assert empty == pytest.approx(100 if metric == "ter" else 0)


@pytest.mark.parametrize("metric", metrics.METRICS)
@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "no hypotheses"),
        (["a"], [], "no references"),
        (["a", "b"], ["a"], "2 hypotheses but 1 references"),
        (["a", "b"], [["a", "b"], ["a"]], "references in set 2"),
    ],
)
def test_lists_that_do_not_fit_are_data_errors(metric, hypotheses, references, message):
    with pytest.raises(DataError, match=message):
        metrics.score(metric, hypotheses, references)


def test_unknown_metric_is_a_configuration_error():
    with pytest.raises(ConfigError, match="'blue'.*bleu, chrf, ter, rouge, bertscore"):
        metrics.score("blue", ["a"], ["a"])


def test_available(monkeypatch):
    found = metrics.available()
    assert list(found) == list(metrics.METRICS)
    assert found["bleu"].version == sacrebleu.__version__ and not found["bleu"].fallback
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    assert all(entry.fallback and entry.version is None for entry in metrics.available().values())


def test_score_survives_json():
    score = metrics.Score("ter", 12.5, "nrefs:1", True)
    assert metrics.Score.from_dict(score.to_dict()) == score


def test_import_is_light():
    code = "import sys, cvmk.validation; print([name for name in ('torch', 'sacrebleu', 'rouge_score', 'bert_score') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter", "rouge"])
def test_decomposed_text_is_the_same_text(metric):
    references = ["Été à la plage, naïve âme, déjà vu.", "Việt Nam đẹp quá đi thôi nhé.", "Über die Straße führt ein schöner Weg."]
    hypotheses = ["Été à la plage, naïve femme, déjà vu.", "Việt Nam rất đẹp quá đi thôi.", "Über die Straße führt kein schöner Weg."]
    for one, other in ((hypotheses, decomposed(references)), (decomposed(hypotheses), references), (decomposed(hypotheses), decomposed(references))):
        assert metrics.score(metric, one, other) == metrics.score(metric, hypotheses, references)


def decomposed(texts):
    return [unicodedata.normalize("NFD", text) for text in texts]
