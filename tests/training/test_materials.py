"""What a run trains on: corpora, its tokenizer, and what its teacher says, which reaches the student as it was said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import train

from cvmk.config import DataConfig, TokenizerConfig, TrainConfig
from cvmk.errors import DataError
from cvmk.inference import Translator
from cvmk.telemetry import Reporter
from cvmk.text.cache import TokenizedCorpus, tokenized
from cvmk.text.corpus import CorpusReport, ParallelCorpus
from cvmk.training import materials
from cvmk.training.materials import load_corpora, prepare_tokenizer, teacher_translations


def data(**values: object) -> DataConfig:
    return TrainConfig.model_validate({"data": values}).data


def test_corpora_of_files(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.tsv").write_text(f"{name}\teins\n{name} again\tzwei\n")
    files = {name: {"tsv": f"{name}.tsv"} for name in ("train", "valid", "test")}
    corpora = load_corpora(data(folder=str(tmp_path), **files))
    assert corpora.train.sources == ["train", "train again"] and corpora.valid.targets == ["eins", "zwei"]
    assert corpora.test is not None and corpora.test.name == "data.test"
    del files["test"]
    assert load_corpora(data(folder=str(tmp_path), **files)).test is None
    (tmp_path / "valid.tsv").unlink()
    with pytest.raises(DataError, match=r"valid\.tsv"):
        load_corpora(data(folder=str(tmp_path), **files))


def test_corpora_of_the_phrasebook() -> None:
    corpora = load_corpora(data(embedded="phrasebook", phrasebook_pairs=1000))
    assert len(corpora.train) == 1000 and len(corpora.valid) and corpora.test is not None and len(corpora.test)


def test_a_tokenizer_is_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = ParallelCorpus(["a cat sat on a mat"] * 20, ["eine Katze saß auf einer Matte"] * 20, "data.train", CorpusReport())
    config = TokenizerConfig(kind="bpe", vocabulary=300)
    first = prepare_tokenizer(config, corpus, tmp_path / "tokenizer", 1, Reporter())
    assert "ß" in "".join(first.pieces), "both sides are in it"
    again = prepare_tokenizer(config, corpus, tmp_path / "tokenizer", 1, Reporter())
    assert again.fingerprint == first.fingerprint and capsys.readouterr().err.count("training a bpe tokenizer of 300 pieces on 20 pairs") == 1
    (tmp_path / "tokenizer" / "done").unlink()  # killed before it was whole
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(b"half")
    assert prepare_tokenizer(config, corpus, tmp_path / "tokenizer", 1, Reporter()).fingerprint == first.fingerprint


PAIRS = (
    ("\u00ab\u00a0O\u00f9 est le chien\u202f?\u00a0\u00bb", "\u00ab\u00a0O\u00f9 est le chien\u202f?\u00a0\u00bb"),
    ("two  spaces", "two  spaces"),
    ("\u3000\u65e5\u672c\u3000\u8a9e\u3000", "\u65e5\u672c\u3000\u8a9e"),
    ("a\u2028b\x0bc\u200bd", "a\u2028b\x0bc\u200bd"),
    (" a\nb\r\nc\t", "a b  c"),
    ("", ""),
    ("  ", ""),
)
SAID, KEPT = ([pair[side] for pair in PAIRS] for side in (0, 1))


@dataclass
class Said:
    text: str


class Parrot:
    """Stands for a translator: says `SAID`, in turn."""

    def __init__(self) -> None:
        self.asked = 0

    def translate(self, texts: Sequence[str], **options: object) -> list[Said]:
        self.asked += len(texts)
        return [Said(SAID[int(text)]) for text in texts]


def ask(parrot: Parrot, folder: Path) -> list[str]:
    return teacher_translations(parrot, "teacher", [str(number) for number in range(len(SAID))], 1, folder, "train", Reporter())  # type: ignore[arg-type]


def test_translations_are_kept_as_they_were_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materials, "_CHUNK", 3)
    parrot = Parrot()
    assert ask(parrot, tmp_path / "cache") == KEPT and parrot.asked == len(SAID)
    assert ask(parrot, tmp_path / "cache") == KEPT and parrot.asked == len(SAID), "the file has the same"
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert ask(parrot, tmp_path / "cache") == KEPT and path.read_bytes() == whole and len(SAID) < parrot.asked < 2 * len(SAID)


def test_what_an_older_cvmk_wrote_is_used_by_the_run_that_it_belongs_to_only(tmp_path: Path) -> None:
    asked = ["teacher", 1, [str(number) for number in range(len(SAID))]]
    for folder in (tmp_path / "shared", tmp_path / "run" / "cache"):
        path = materials._file(folder, "train", asked)
        folder.mkdir(parents=True)
        path.write_text("".join(json.dumps(" ".join(text.split())) + "\n" for text in SAID))
    (tmp_path / "run" / "config.resolved.json").write_text("{}")
    assert ask(Parrot(), tmp_path / "shared") == KEPT
    assert ask(Parrot(), tmp_path / "run" / "cache") == [" ".join(text.split()) for text in SAID]


def test_a_student_learns_the_white_space_of_its_teacher(with_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the teacher's search to the student's training pairs."""
    original = Translator.translate

    def translate(self: Translator, texts: Sequence[str], **options: object) -> object:
        found = original(self, texts, **options)  # type: ignore[arg-type]
        if options.get("beam_size") == 2:
            for one in found:
                object.__setattr__(one, "text", "\u00ab\u00a0so  ist es\u3000so\u202f!\u00a0\u00bb")
        return found

    monkeypatch.setattr(Translator, "translate", translate)
    short = ["training.iterations=2", "teacher.training.iterations=2", "teacher.validation.validate_every=2"]
    sequence = ["distillation.sequence_level.enabled=true", "distillation.sequence_level.mix=replace", "distillation.sequence_level.beam_size=2"]
    targets: list[list[str]] = []

    def spy(corpus: ParallelCorpus, *options: object) -> TokenizedCorpus:
        targets.append(corpus.targets)
        return tokenized(corpus, *options)  # type: ignore[arg-type]

    monkeypatch.setattr("cvmk.training.pipeline.tokenized", spy)
    train(with_teacher, *short, *sequence)
    assert targets[-1] == ["\u00ab\u00a0so  ist es\u3000so\u202f!\u00a0\u00bb"] * 400
