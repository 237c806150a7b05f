from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
import types
from dataclasses import dataclass

import pytest

import cvmk.inference
from cvmk.cli import main
from cvmk.errors import DataError
from cvmk.telemetry import RunLog, read_events
from cvmk.telemetry.schema import Evaluation
from cvmk.validation import paired, score

REFERENCES = [
    "Ein Mann sitzt auf einer Bank.",
    "Zwei Kinder laufen durch den Bach.",
    "Das Brot kostet 2,50 Euro.",
    "Der Hund schläft unter dem Tisch.",
    "Eine Frau liest ein Buch im Park.",
    "Wir gehen heute nicht ins Kino.",
    "Der Zug fährt um 10:45 Uhr ab.",
    "Sie hat den Schlüssel gefunden.",
]
SOURCES = [f"sentence {number}" for number in range(len(REFERENCES))]
GOOD = [*REFERENCES[:6], "Der Zug fährt um elf Uhr ab.", "Sie hat einen Schlüssel."]
BAD = ["Ein Mann.", "Kinder", "Das Brot kostet viel Euro.", "", *["Das ist falsch gesagt."] * 4]


@dataclass
class Translation:
    text: str
    tokens: list[str]


class Translator:
    """Stands for the real one: a model folder holds the translations, by source sentence."""

    calls: list[dict]

    def __init__(self, path, device="cpu"):
        try:
            with open(f"{path}/answers.json", encoding="utf-8") as file:
                self.answers = json.load(file)
        except OSError as error:
            raise DataError(f"{path} is no model folder") from error
        self.device = device
        self.info = self.answers.pop("info", {})

    def translate(self, texts, *, beam_size, max_batch_tokens, on_long, scores):
        assert on_long == "truncate", "one long sentence must not end a validation"
        self.calls.append({"beam_size": beam_size, "max_batch_tokens": max_batch_tokens, "device": self.device})
        print("a library that prints")
        return [Translation(self.answers[text], self.answers[text].split()) for text in texts]


@pytest.fixture
def calls(monkeypatch):
    module = types.ModuleType("cvmk.inference")
    module.Translator = Translator
    module.__path__ = list(cvmk.inference.__path__)
    monkeypatch.setitem(sys.modules, "cvmk.inference", module)
    monkeypatch.setattr(Translator, "calls", [], raising=False)
    return Translator.calls


@pytest.fixture
def place(tmp_path, calls, monkeypatch):
    """A working folder with two models and the test set."""
    monkeypatch.chdir(tmp_path)
    for name, answers in (("good", GOOD), ("bad", BAD)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "answers.json").write_text(json.dumps(dict(zip(SOURCES, answers, strict=True))), encoding="utf-8")
    (tmp_path / "test.en").write_text("\n".join(SOURCES) + "\n", encoding="utf-8")
    (tmp_path / "test.de").write_text("\n".join(REFERENCES) + "\n", encoding="utf-8")
    return tmp_path


def validate(model, *options, source="test.en", reference="test.de"):
    return main(["validate", model, "--source", source, "--reference", reference, "--bootstrap", "100", *options])


def test_table(place, calls, capsys):
    assert validate("good", "--beam-size", "4", "--batch-tokens", "99", "--device", "cuda:1") == 0
    assert calls == [{"beam_size": 4, "max_batch_tokens": 99, "device": "cuda:1"}]
    out = capsys.readouterr().out
    for metric in ("bleu", "chrf", "ter"):
        entry = score(metric, GOOD, REFERENCES)
        line = next(line for line in out.splitlines() if line.startswith(entry.label))
        assert f"{entry.value:.2f}" in line and line.endswith(entry.signature)
    assert "8 sentences" in out and "tokens/s" in out and "95% interval" in out


def test_events_go_into_a_folder(place, capsys):
    assert validate("good", "--baseline", "bad", "--log", "log") == 0
    assert validate("bad", "--log", "log", "--min-score", "bleu=99") == 3
    records, problems = read_events("log/events.jsonl")
    assert problems == [] and [record.event.model for record in records] == ["good", "bad", "bad"]
    event = records[0].event
    assert isinstance(event, Evaluation) and event.metric == "bleu" and event.low <= event.value <= event.high and len(event.scores) == 3
    assert event.value == score("bleu", GOOD, REFERENCES).value
    assert "good: bleu" in (place / "log" / "log.txt").read_text()
    log = RunLog(place / "log")
    try:
        assert validate("good", "--log", "log") == 2
    finally:
        log.close()
    assert "another process writes the logs in log" in capsys.readouterr().err


def test_json_is_alone_on_stdout(place, capsys):
    assert validate("good", "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "a library that prints" in captured.err
    assert (report["model"], report["sentences"], report["passed"], report["baseline"], report["gates"]) == ("good", 8, True, None, [])
    assert report["tokens"] == sum(len(text.split()) for text in GOOD)
    for entry in report["scores"]:
        expected = score(entry["metric"], GOOD, REFERENCES)
        assert (entry["value"], entry["signature"], entry["fallback"]) == (expected.value, expected.signature, False)
        assert entry["low"] <= entry["value"] <= entry["high"]


def test_metrics_by_blank_or_comma(place, capsys):
    assert validate("good", "--metrics", "chrf,ter", "chrf", "rouge", "--json") == 0
    assert [entry["metric"] for entry in json.loads(capsys.readouterr().out)["scores"]] == ["chrf", "ter", "rouge"]


def test_fallbacks_are_labelled_in_both_outputs(place, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sacrebleu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    expected = score("bleu", GOOD, REFERENCES)
    assert validate("good", "--baseline", "bad", "--metrics", "bleu") == 0
    out = capsys.readouterr().out
    assert out.count("BLEU (fallback)") == 3, "model, baseline, comparison"
    assert expected.signature in out and expected.signature.startswith("cvmk-fallback|")
    assert validate("good", "--json", "--metrics", "bleu") == 0
    assert json.loads(capsys.readouterr().out)["scores"][0]["fallback"] is True


def test_baseline(place, capsys):
    assert validate("bad", "--baseline", "good", "--json") == 0
    baseline = json.loads(capsys.readouterr().out)["baseline"]
    assert baseline["model"] == "good"
    assert [entry["value"] for entry in baseline["scores"]] == [score(metric, GOOD, REFERENCES).value for metric in ("bleu", "chrf", "ter")]
    for entry in baseline["paired"]:
        assert entry == paired(entry["metric"], BAD, GOOD, REFERENCES, samples=100).to_dict()
    assert validate("bad", "--baseline", "good") == 0
    out = capsys.readouterr().out
    assert "Baseline good" in out and "Paired bootstrap, 100 resamples" in out and f"{baseline['paired'][0]['p_value']:.4f}" in out


@pytest.mark.parametrize(
    ("limit", "code"),
    [("bleu=80", 0), ("bleu=99", 3), ("ter=30", 0), ("ter=1", 3), ("rouge=50", 0), ("rouge=99.9", 3)],
)
def test_min_score(place, capsys, limit, code):
    assert validate("good", "--min-score", limit) == code
    captured = capsys.readouterr()
    assert "metric" in captured.out, "the scores are printed also when a gate fails"
    assert ("the limit of" in captured.err) == (code == 3)
    assert "Traceback" not in captured.err


def test_failed_gate_in_json(place, capsys):
    assert validate("good", "--min-score", "bleu=99", "--min-score", "chrf=10", "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    assert [(gate["metric"], gate["limit"], gate["passed"]) for gate in report["gates"]] == [("bleu", 99, False), ("chrf", 10, True)]


@pytest.mark.parametrize(
    ("model", "baseline", "metrics", "limit", "code"),
    [
        ("bad", "good", "bleu", "5", 3),
        ("bad", "good", "ter", "5", 3),
        ("bad", "good", "bleu", "99", 0),
        ("good", "bad", "bleu", "0", 0),
        ("good", "good", "ter", "0", 0),
    ],
)
def test_max_drop(place, capsys, model, baseline, metrics, limit, code):
    assert validate(model, "--baseline", baseline, "--metrics", metrics, "--max-drop", limit) == code
    assert ("worse than the baseline's" in capsys.readouterr().err) == (code == 3)


def test_gzip_crlf_byte_order_mark_and_empty_lines(place, capsys):
    references = [*REFERENCES[:-1], ""]
    (place / "test.en.gz").write_bytes(gzip.compress("\n".join(SOURCES).encode()))
    (place / "odd.de").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(references).encode() + b"\r\n")
    assert validate("good", "--json", source="test.en.gz", reference="odd.de") == 0
    assert json.loads(capsys.readouterr().out)["scores"][0]["value"] == score("bleu", GOOD, references).value


def test_unicode_line_separators_do_not_split_lines(place, capsys):
    (place / "test.de").write_text("\n".join(text.replace(" ", "\u2028", 1) for text in REFERENCES) + "\n", encoding="utf-8")
    assert validate("good", "--json") == 0
    assert json.loads(capsys.readouterr().out)["sentences"] == 8


JAPANESE = ["朝に私は歌を買います。", "毎日あなたは水を売ります。", "今日医者は電車を買います。"]


def japanese(place, languages, name="japanese"):
    (place / name).mkdir()
    answers = {"info": {"languages": languages}, **dict(zip("abc", JAPANESE, strict=True))}
    (place / name / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    (place / "abc").write_text("a\nb\nc\n")
    (place / "abc.ja").write_text("\n".join(JAPANESE) + "\n", encoding="utf-8")
    return {"source": "abc", "reference": "abc.ja"}


@pytest.mark.parametrize(
    ("languages", "tokenizer"),
    [({"source": "en", "target": "zh-Hant"}, "zh"), ({"source": "en", "target": "jpn"}, "char"), (None, "char"), ({"source": "en", "target": "de"}, "char")],
)
def test_words_by_the_language_of_the_model(place, capsys, monkeypatch, languages, tokenizer):
    monkeypatch.setattr("cvmk.validation.tokenization.unavailable", lambda name: None if name in ("char", "zh") else "it is not installed")
    files = japanese(place, languages)
    assert validate("japanese", "--json", "--metrics", "bleu", "chrf", "ter", "rouge", "--min-score", "bleu=99.9", **files) == 0
    report = json.loads(capsys.readouterr().out)
    assert [round(entry["value"], 6) for entry in report["scores"]] == [100, 100, 0, 100]
    assert f"tok:{tokenizer}|" in report["scores"][0]["signature"] and "asian:yes" in report["scores"][2]["signature"]
    assert report["language"] == (languages and languages["target"])
    assert any('"de" is not' in note for note in report["notes"]) == (languages is not None and languages["target"] == "de")
    assert validate("japanese", "--metrics", "bleu", **files) == 0
    assert ("Note: " in (out := capsys.readouterr().out)) == (tokenizer == "char") and ("--metrics chrf" in out) == (tokenizer == "char")


def test_the_tokeniser_can_be_named(place, capsys):
    files = japanese(place, {"source": "en", "target": "ja"})
    assert validate("japanese", "--baseline", "japanese", "--tokenize", "13a", "--json", **files) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["scores"][0]["value"] == 0 and "tok:13a" in report["scores"][0]["signature"] == report["baseline"]["scores"][0]["signature"]
    assert any("only 0.00" in note for note in report["notes"])
    assert validate("good", "--tokenize", "intl", "--json") == 0
    assert "tok:intl" in json.loads(capsys.readouterr().out)["scores"][0]["signature"]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_by_content(place, capsys, compress):
    (place / "en").write_bytes(compress("\n".join(SOURCES).encode()))
    (place / "de").write_bytes(compress("\ufeff".join([*REFERENCES[:1], *(f"\n{line}" for line in REFERENCES[1:])]).encode()))
    assert validate("good", "--json", source="en", reference="de") == 0
    assert json.loads(capsys.readouterr().out)["scores"][0]["value"] == score("bleu", GOOD, REFERENCES).value


def test_standard_input(place, capsys, monkeypatch):
    text = gzip.compress("\n".join(REFERENCES).encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert validate("good", "--json", reference="-") == 0
    assert json.loads(capsys.readouterr().out)["scores"][0]["value"] == score("bleu", GOOD, REFERENCES).value
    assert validate("good", source="-", reference="-") == 2
    assert "both standard input" in capsys.readouterr().err


def broken_gzip(place):
    whole = gzip.compress(b"one\ntwo\n" * 100)
    (place / "cut.gz").write_bytes(whole[:-12])
    (place / "wide").write_bytes("eins\nzwei\n".encode("utf-16"))
    (place / "wide.gz").write_bytes(gzip.compress("eins\nzwei\n".encode("utf-16-le")))
    (place / "noise.gz").write_bytes(b"\x8fthis is not gzip")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"source": "missing.en"}, "cannot read missing.en: No such file or directory"),
        ({"reference": "missing.de"}, "cannot read missing.de: No such file or directory"),
        ({"source": "."}, "cannot read .: Is a directory"),
        ({"reference": "empty"}, "empty is empty"),
        ({"source": "short"}, "short has 2 lines but test.de has 8"),
        ({"reference": "latin"}, "latin line 3 is not valid UTF-8 (byte 2)"),
        ({"source": "cut.gz"}, "cut.gz is a truncated or corrupt gzip file"),
        ({"source": "wide"}, "wide is UTF-16 text: convert it to UTF-8"),
        ({"source": "wide.gz"}, "wide.gz is UTF-16LE text: convert it to UTF-8"),
        ({"source": "noise.gz"}, "noise.gz is neither a gzip file, as its name says, nor text"),
    ],
)
def test_bad_files(place, calls, capsys, files, message):
    (place / "empty").write_bytes(b"")
    (place / "short").write_text("a\nb\n")
    (place / "latin").write_bytes(b"gut\nauch gut\nk\xe4se\n")
    broken_gzip(place)
    assert validate("good", "--json", **files) == 5
    captured = capsys.readouterr()
    assert captured.err.startswith("cvmk: ") and message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""
    assert calls == [], "nothing is translated before the files are known to be good"


def test_missing_models(place, calls, capsys):
    assert validate("nowhere") == 5
    assert validate("good", "--baseline", "nowhere") == 5
    assert "nowhere is no model folder" in capsys.readouterr().err
    assert calls == [], "the baseline is opened before anything is translated"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "blue"], "unknown metric 'blue'"),
        (["--metrics", ","], "names no metric"),
        (["--min-score", "blue=3"], "unknown metric 'blue'"),
        (["--min-score", "bleu"], "not METRIC=VALUE"),
        (["--min-score", "bleu=high"], "not METRIC=VALUE"),
        (["--min-score", "bleu=nan"], "not METRIC=VALUE"),
        (["--max-drop", "1"], "--baseline"),
        (["--tokenize", "moses"], "--tokenize is 'moses': choose from auto, 13a"),
        (["--tokenize", "flores200"], "nothing is downloaded"),
    ],
)
def test_wrong_options_are_configuration_errors(place, capsys, options, message):
    assert validate("good", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "options",
    [
        ["--beam-size", "0"],
        ["--beam-size", "two"],
        ["--batch-tokens", "-5"],
        ["--bootstrap", "3"],
        ["--bootstrap", "1000000000000"],
        ["--confidence", "95"],
        ["--baseline", "bad", "--max-drop", "-1"],
        ["--no-such-option"],
    ],
)
def test_wrong_values_end_with_usage_and_code_2(place, capsys, options):
    with pytest.raises(SystemExit) as ended:
        validate("good", *options)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert options[-2:][0] in captured.err and captured.out == ""


def test_a_beam_beyond_all_sense_is_refused_before_anything_is_loaded(place, calls, capsys):
    assert validate("good", "--beam-size", "1025") == 2
    assert capsys.readouterr().err == "cvmk: beam_size is 1025, and must be at most 1024\n" and calls == []


def test_a_real_model(tmp_path, capsys):
    """End to end with an untrained model: what is printed is the score of what its translator says."""
    torch = pytest.importorskip("torch")
    from cvmk.config.schema import ModelConfig, TokenizerConfig
    from cvmk.formats import save_model_folder
    from cvmk.inference import Translator
    from cvmk.nn import CVMTransformer
    from cvmk.text.tokenizers import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(REFERENCES * 4, TokenizerConfig(kind="fallback", vocabulary=300), seed=0)
    model = CVMTransformer(ModelConfig(d_model=16, ffn=16, heads=2, encoder_layers=1, decoder_layers=1, max_length=24), tokenizer.vocab_size)
    folder = tmp_path / "model"
    save_model_folder(folder, model, tokenizer, card="A model for a test.", extra=None)
    long = "Der Hund schläft unter dem Tisch. " * 20
    (tmp_path / "source").write_text("\n".join([*REFERENCES, "", long]), encoding="utf-8")
    (tmp_path / "reference").write_text("\n".join([*REFERENCES, "", long]), encoding="utf-8")
    files = {"source": str(tmp_path / "source"), "reference": str(tmp_path / "reference")}
    assert validate(str(folder), "--baseline", str(folder), "--max-drop", "0", "--json", "--beam-size", "2", **files) == 0
    report = json.loads(capsys.readouterr().out)
    hypotheses = [found.text for found in Translator(folder).translate([*REFERENCES, "", long], beam_size=2, on_long="truncate")]
    assert [entry["value"] for entry in report["scores"]] == [score(metric, hypotheses, [*REFERENCES, "", long]).value for metric in ("bleu", "chrf", "ter")]
    assert [entry["difference"] for entry in report["baseline"]["paired"]] == [0, 0, 0]
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    (tmp_path / "no model").mkdir()
    for broken in (folder, tmp_path / "no model", tmp_path / "missing"):
        assert validate(str(broken), **files) == 5
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("cvmk: ") and str(broken) in captured.err
