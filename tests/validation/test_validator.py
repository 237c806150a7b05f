from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest

from cvmk.config.schema import ValidationConfig
from cvmk.errors import ConfigError, DataError
from cvmk.validation import DistillationValidator, ValidationResult
from cvmk.validation.bootstrap import interval
from cvmk.validation.metrics import score

CONFIG = ValidationConfig(bootstrap=200)


@dataclass
class Output:
    text: str
    tokens: list[int]


class Translator:
    """Gives prepared texts and remembers how it was called."""

    def __init__(self, texts):
        self.texts = dict(texts)
        self.calls = []

    def translate(self, texts, *, beam_size, **options):
        self.calls.append((len(texts), beam_size, options))
        return [Output(self.texts[text], [1] * len(self.texts[text].split())) for text in texts]


@pytest.fixture
def sources(references):
    return [f"source {number}" for number in range(len(references))]


@pytest.fixture
def systems(sources, references, damaged):
    """Translators by the damage that they do, in percent."""
    return {percent: Translator(zip(sources, damaged(references, 11, percent / 100), strict=True)) for percent in (0, 10, 20, 30, 70)}


def test_scores_interval_speed_and_samples(sources, references, hypotheses):
    translator = Translator(zip(sources, hypotheses, strict=True))
    config = ValidationConfig(bootstrap=200, confidence=0.9, beam_size=3, metric="chrf", metrics=["ter", "rouge"])
    result = DistillationValidator(config, sources, references).run(translator, step=7, max_batch_tokens=64)
    assert translator.calls == [(40, 3, {"max_batch_tokens": 64})]
    assert [entry.metric for entry in result.scores] == ["chrf", "ter", "rouge"], "the deciding metric comes first and is always there"
    for entry in result.scores:
        assert entry == score(entry.metric, hypotheses, references)
    assert (result.step, result.metric, result.value) == (7, "chrf", score("chrf", hypotheses, references).value)
    assert (result.low, result.high) == interval("chrf", hypotheses, references, 200, 0.9)
    assert result.tokens == sum(len(text.split()) for text in hypotheses)
    assert result.seconds > 0
    assert result.sentences_per_second == pytest.approx(40 / result.seconds)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert (result.samples[1].source, result.samples[1].hypothesis, result.samples[1].reference) == (sources[1], hypotheses[1], references[1])
    assert result.score("ter").metric == "ter"
    with pytest.raises(KeyError):
        result.score("bleu")


def test_plain_callable_has_no_token_count(sources, references):
    result = DistillationValidator(CONFIG, sources, references).run(lambda texts: list(references), step=1)
    assert result.value == pytest.approx(100)
    assert result.tokens is None and result.tokens_per_second is None
    assert result.agreement == ()


def test_agreement_with_the_teacher(sources, references, hypotheses, worse_hypotheses):
    validator = DistillationValidator(CONFIG, sources, references, teacher_outputs=worse_hypotheses)
    result = validator.run(lambda texts: hypotheses, step=1)
    assert [entry.metric for entry in result.agreement] == ["bleu", "chrf", "ter"]
    for entry in result.agreement:
        assert entry == score(entry.metric, hypotheses, worse_hypotheses)


def test_only_the_first_sentences_count(sources, references, worse_hypotheses):
    validator = DistillationValidator(ValidationConfig(bootstrap=50, max_sentences=6), sources, references, worse_hypotheses)
    result = validator.run(lambda texts: references[: len(texts)], step=1)
    assert result.sentences == len(result.hypotheses) == 6
    assert result.agreement[0] == score("bleu", references[:6], worse_hypotheses[:6])


def test_better_follows_direction_and_min_delta(sources, references, systems):
    validator = DistillationValidator(CONFIG, sources, references)
    good, bad = validator.run(systems[20], 1), validator.run(systems[70], 2)
    assert validator.better(good, None) and validator.better(good, bad)
    assert not validator.better(bad, good) and not validator.better(good, good)
    strict = DistillationValidator(ValidationConfig(min_delta=5.0), sources, references)
    assert strict.better(replace(good, value=good.value + 5.0), good)
    assert not strict.better(replace(good, value=good.value + 4.9), good)
    by_ter = DistillationValidator(ValidationConfig(metric="ter", bootstrap=50), sources, references)
    good, bad = by_ter.run(systems[20], 1), by_ter.run(systems[70], 2)
    assert good.value < bad.value
    assert by_ter.better(good, bad) and not by_ter.better(bad, good)
    assert not by_ter.better(replace(good, value=float("nan")), bad)


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter", "rouge", "bertscore"])
def test_regressed_beyond_noise_only(metric, sources, references, hypotheses, worse_hypotheses):
    validator = DistillationValidator(ValidationConfig(metric=metric, metrics=[metric], bootstrap=300), sources, references)
    best = validator.run(lambda texts: hypotheses, 1)
    much_worse = validator.run(lambda texts: worse_hypotheses, 2)
    one_worse_line = list(hypotheses)
    one_worse_line[4] = "ganz falsch"
    slightly_worse = validator.run(lambda texts: one_worse_line, 3)
    assert not validator.better(slightly_worse, best)
    assert validator.regressed(much_worse, best)
    assert not validator.regressed(slightly_worse, best)
    assert not validator.regressed(best, much_worse)
    assert not validator.regressed(best, best)
    assert not validator.regressed(best, None)


def test_regressed_needs_the_hypotheses(sources, references, systems):
    validator = DistillationValidator(CONFIG, sources, references)
    best, worse = validator.run(systems[20], 1), validator.run(systems[70], 2)
    with pytest.raises(ValueError, match="step 1 has 0 hypotheses for 40 references"):
        validator.regressed(worse, ValidationResult.from_dict(best.to_dict()))


def test_best_and_history(tmp_path, sources, references, systems):
    file, folder = tmp_path / "run" / "validation_history.json", tmp_path / "run" / "hypotheses"
    validator = DistillationValidator(CONFIG, sources, references, history_path=file, hypotheses_folder=folder)
    results = [validator.run(systems[percent], step) for step, percent in ((10, 30), (20, 10), (30, 70))]
    assert validator.history == results
    assert validator.best is results[1]
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written == [result.to_dict() for result in results]
    assert [entry["step"] for entry in written] == [10, 20, 30]
    assert "hypotheses" not in written[0]
    assert set(written[0]["scores"][0]) == {"metric", "value", "signature", "fallback"}
    assert (folder / "step-20.txt").read_text(encoding="utf-8").split("\n")[:-1] == list(results[1].hypotheses)


def test_hypotheses_files_have_one_line_a_sentence(tmp_path, sources, references):
    odd = ["a\nb\u2028c", "", *["x"] * (len(sources) - 2)]
    DistillationValidator(CONFIG, sources, references, hypotheses_folder=tmp_path).run(lambda texts: odd, 5)
    lines = (tmp_path / "step-5.txt").read_text(encoding="utf-8").split("\n")
    assert len(lines) == len(sources) + 1
    assert lines[:2] == ["a b c", ""]


def test_resume_is_exact(tmp_path, sources, references, systems):
    """Straight on, and through JSON into a new validator: the same history, best, and decisions."""
    straight = DistillationValidator(CONFIG, sources, references)
    straight.run(systems[30], 1)
    straight.run(systems[10], 2)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = DistillationValidator(CONFIG, sources, references, history_path=tmp_path / "history.json")
    resumed.load_state_dict(state)
    assert resumed.history == straight.history
    assert resumed.best == straight.best and resumed.best.hypotheses == straight.best.hypotheses
    assert len(json.loads((tmp_path / "history.json").read_text())) == 2
    for validator in (straight, resumed):
        worse = validator.run(systems[70], 3)
        assert validator.regressed(worse, validator.best)
    assert resumed.compare(resumed.history[-1], resumed.best) == straight.compare(straight.history[-1], straight.best)
    assert [entry.step for entry in resumed.history] == [1, 2, 3]


JAPANESE = ["朝に私は歌を買います。", "毎日あなたは水を売ります。", "今日医者は電車を買います。"]


def test_the_language_chooses_the_tokenisers(references, hypotheses, sources):
    validator = DistillationValidator(CONFIG, JAPANESE, JAPANESE, JAPANESE, language="zh-Hant")
    result = validator.run(lambda texts: JAPANESE, 1)
    assert (result.value, result.low, result.high) == pytest.approx((100, 100, 100))
    for entry in (result.score("bleu"), result.agreement[0]):
        assert entry.value == pytest.approx(100) and "tok:zh" in entry.signature
    assert "asian:yes" in result.score("ter").signature
    assert "tok:zh" in validator.history[0].to_dict()["scores"][0]["signature"]
    assert not validator.regressed(validator.run(lambda texts: JAPANESE, 2), result)
    assert validator.without_history().run(lambda texts: JAPANESE, 3).score("bleu") == result.score("bleu")
    assert len(validator.history) == 2
    german = DistillationValidator(CONFIG, sources, references, language="de-AT").run(lambda texts: hypotheses, 1)
    assert german.score("bleu") == score("bleu", hypotheses, references)
    by_key = DistillationValidator(ValidationConfig(bleu_tokenize="intl"), sources, references, language="zh").run(lambda texts: hypotheses, 1)
    assert "tok:intl" in by_key.score("bleu").signature


def test_a_metric_that_knows_nothing_again_is_refused_before_training(sources, references):
    blind = DistillationValidator(ValidationConfig(bleu_tokenize="13a"), JAPANESE, JAPANESE, language="ja", say=pytest.fail)
    with pytest.raises(ConfigError, match='metric = "bleu" cannot choose .*0.00.*"chrf", or validation.bleu_tokenize = "char", .*target_language .ja'):
        blind.check_metric()
    said = []
    short = DistillationValidator(CONFIG, ["a", "b"], ["Ja.", "Guten Tag."], language="de", say=said.append)
    with pytest.raises(ConfigError, match="too few words"):
        short.check_metric()
    short.check_metric(refuse=False)
    assert len(said) == 1 and "too few words" in said[0]
    DistillationValidator(CONFIG, sources, references, say=pytest.fail).check_metric()
    DistillationValidator(ValidationConfig(metric="chrf"), ["a"], ["Ja."], say=pytest.fail).check_metric()


def test_makeshift_words_are_said():
    said = []
    DistillationValidator(CONFIG, ["a", "b"], ["ฉันกินข้าวทุกวัน", "วันนี้อากาศดีมาก"], language="th", say=said.append).check_metric()
    assert len(said) == 1 and "characters" in said[0] and 'validation.metric = "chrf"' in said[0]


def test_a_run_that_was_scored_with_other_words_is_not_mixed():
    """Japanese by 13a: every value is 0, and of equal ones the latest is the best."""
    sources = ["a", "b", "c"]
    old = DistillationValidator(ValidationConfig(bleu_tokenize="13a"), sources, JAPANESE, language="ja")
    old.run(lambda texts: JAPANESE[:1] * 3, 10)
    old.run(lambda texts: ["朝に私は水を買います。", *JAPANESE[1:]], 20)
    state = json.loads(json.dumps(old.state_dict()))
    assert state["best"]["result"]["step"] == 20 and state["best"]["result"]["value"] < 70
    said = []
    new = DistillationValidator(ValidationConfig(bleu_tokenize="char"), sources, JAPANESE, language="ja", say=said.append)
    new.load_state_dict(state)
    assert len(said) == 1 and all(word in said[0] for word in ("tok:13a", "tok:char", "iteration 20", "not comparable"))
    hypotheses = state["best"]["hypotheses"]
    assert new.best.value == score("bleu", hypotheses, JAPANESE, new.tokenization).value > 80
    assert new.best.low <= new.best.value <= new.best.high and new.best.step == 20 and new.best.score("bleu").value == new.best.value
    assert ["tok:13a" in entry.score("bleu").signature for entry in new.history] == [True, True], "the history says how it was made"
    better = new.run(lambda texts: JAPANESE, 30)
    assert new.best is better and new.compare(better, better).difference == 0
    again = DistillationValidator(ValidationConfig(bleu_tokenize="char"), sources, JAPANESE, language="ja", say=pytest.fail)
    again.load_state_dict(json.loads(json.dumps(new.state_dict())))
    assert again.best == new.best


def test_state_before_the_first_validation(sources, references):
    validator = DistillationValidator(CONFIG, sources, references)
    validator.load_state_dict(json.loads(json.dumps(validator.state_dict())))
    assert validator.history == [] and validator.best is None


def test_state_of_another_validation_set(sources, references, systems):
    validator = DistillationValidator(CONFIG, sources, references)
    validator.run(systems[10], 1)
    other = DistillationValidator(CONFIG, sources[:30], references[:30])
    with pytest.raises(ConfigError, match="40 sentences, this one has 30"):
        other.load_state_dict(validator.state_dict())


def test_sets_that_do_not_fit(sources, references):
    with pytest.raises(DataError, match="empty"):
        DistillationValidator(CONFIG, [], [])
    with pytest.raises(DataError, match="40 sources but 39 references"):
        DistillationValidator(CONFIG, sources, references[1:])
    with pytest.raises(DataError, match="40 sources but 1 teacher outputs"):
        DistillationValidator(CONFIG, sources, references, ["x"])
    with pytest.raises(ValueError, match="1 translations for 40 sources"):
        DistillationValidator(CONFIG, sources, references).run(lambda texts: ["x"], 1)


def test_unwritable_history_is_a_data_error_and_keeps_the_old_file(tmp_path, sources, references, systems):
    (tmp_path / "file").write_text("not a folder")
    validator = DistillationValidator(CONFIG, sources, references, history_path=tmp_path / "file" / "history.json")
    with pytest.raises(DataError, match="cannot write"):
        validator.run(systems[10], 1)
    assert (tmp_path / "file").read_text() == "not a folder"
