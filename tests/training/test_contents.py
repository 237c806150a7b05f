"""A resumed run is made of the same text, tokenizer and teacher, wherever they are now."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import train

from cvmk.cli import main
from cvmk.errors import ConfigError, DataError
from cvmk.text.corpus import CorpusReport, ParallelCorpus
from cvmk.training.contents import Content, check_contents, contents_of, to_json

SHORT = ("training.iterations=2", "validation.max_sentences=2", "validation.validate_every=2")


def corpus(sources: list[str], targets: list[str], name: str = "data.train", origin: str = "a") -> ParallelCorpus:
    return ParallelCorpus(sources, targets, name, CorpusReport(), origin)


def test_a_fingerprint_is_of_the_content_in_its_order() -> None:
    one = corpus(["a", "b"], ["c", "d"])
    assert one.fingerprints == corpus(["a", "b"], ["c", "d"], "data.valid", "elsewhere").fingerprints
    others = [corpus(["b", "a"], ["d", "c"]), corpus(["a", "b"], ["d", "c"]), corpus(["a b"], ["c d"]), corpus(["ab", ""], ["c", "d"]), corpus(["a"], ["c"])]
    assert len({one.fingerprints, *(other.fingerprints for other in others)}) == 6
    long = [str(number) for number in range(10_000)]
    assert corpus(long, long).fingerprints[0] == corpus(long, long).fingerprints[1] != corpus(long[:-1], long).fingerprints[0]


def test_every_change_is_named(tmp_path: Path) -> None:
    before = contents_of([corpus(["a"], ["b"], "data.train", "t.tsv"), corpus(["a"], ["b"], "data.test", "e.tsv")])
    before["teacher.path"] = Content("teacher", "1")
    check_contents(tmp_path, json.loads(json.dumps(to_json(before))), before)
    now = contents_of([corpus(["a", "c"], ["b", "d"], "data.train", "u.tsv")]) | {"teacher.path": Content("other", "2"), "tokenizer.path": Content("tok", "3")}
    with pytest.raises(DataError) as caught:
        check_contents(tmp_path, to_json(before), now)
    for words in (
        *("u.tsv has another content (1 usable sentences then, 2 now);", "e.tsv (data.test) was part of it;", "other has another content;"),
        *("tok (tokenizer.path) was not part of it;", "--restart"),
    ):
        assert words in str(caught.value)
    assert str(caught.value).count("u.tsv") == 1, "both sides are in one file"
    before["teacher.path"] = Content("teacher", "1", settled=False)
    check_contents(tmp_path, to_json(before), before | {"teacher.path": Content("teacher", "2")})
    with pytest.raises(DataError, match=r"contents\.json is corrupt"):
        check_contents(tmp_path, [], now)


# -- whole runs --------------------------------------------------------------------------------------------------------------------
def reverse(text: str) -> str:
    return "".join(reversed(text.splitlines(keepends=True)))


def edit(text: str) -> str:
    first, rest = text.split("\n", 1)
    return f"{first}!\n{rest}"


CHANGES: list[tuple[str, Callable[[str], str], str]] = [
    ("train.tsv", reverse, "train.tsv has another content;"),
    ("train.tsv", edit, "train.tsv has another content;"),
    ("train.tsv", lambda text: text.split("\n", 1)[1], "train.tsv has another content (400 usable sentences then, 399 now);"),
    ("valid.tsv", reverse, "valid.tsv has another content;"),
]


def test_a_changed_text_is_refused_and_the_run_stays_as_it_is(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config, *SHORT)
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in ("config.toml", "config.resolved.json", "contents.json")}
    capsys.readouterr()
    for name, change, words in CHANGES:
        whole = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(change(whole), encoding="utf-8")
        code = main(["train", str(config), "--resume", *(word for override in SHORT for word in ("--set", override))])
        assert code == 5 and f"{tmp_path}/{words}" in (told := capsys.readouterr().err) and told.count("\n") == 1
        (tmp_path / name).write_text(whole, encoding="utf-8")
    assert kept == {name: (tmp_path / "run" / name).read_bytes() for name in kept}
    train(config, *SHORT, resume=True)


def test_the_same_text_elsewhere_and_in_another_form_is_accepted(config: Path, tmp_path: Path) -> None:
    train(config, *SHORT)
    (tmp_path / "moved").mkdir()
    pairs = [line.split("\t") for line in (tmp_path / "train.tsv").read_text(encoding="utf-8").splitlines()]
    for side, name in enumerate(("t.en", "t.de.gz")):
        data = "\ufeff".join(pair[side] + " \r\n" for pair in pairs).encode()
        (tmp_path / "moved" / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    pairs = [line.split("\t") for line in (tmp_path / "valid.tsv").read_text(encoding="utf-8").splitlines()]
    (tmp_path / "moved" / "v.jsonl").write_text("".join(json.dumps({"en": s, "target": t}) + "\n" for s, t in pairs))
    text = config.read_text().replace('"valid.tsv"', '"v.jsonl"').replace("tsv = \"v.jsonl\"", 'jsonl = "v.jsonl"')
    text = text.replace('tsv = "train.tsv"', 'source = "t.en", target = "t.de.gz"')
    config.write_text(text.replace(f'[data]\nfolder = "{tmp_path}"', f'[data]\njsonl_source = "en"\nfolder = "{tmp_path}/moved"'))
    assert train(config, *SHORT, "training.iterations=3", resume=True)["iterations"] == 3
    (tmp_path / "moved" / "t.de.gz").write_bytes(gzip.compress(b"x\n" * 400))
    with pytest.raises(DataError, match=r"made of other things: \S+/t\.de\.gz has another content; restore"):
        train(config, *SHORT, resume=True)


def test_a_test_set_that_goes_or_comes_is_named(config: Path, tmp_path: Path) -> None:
    train(config, *SHORT)
    config.write_text(config.read_text().replace('test = { tsv = "valid.tsv" }', ""))
    with pytest.raises(DataError, match=r"valid\.tsv \(data\.test\) was part of it"):
        train(config, *SHORT, resume=True)


def test_tokenizer_and_teacher_by_content(config: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        train(config, *SHORT, f"run.folder={tmp_path}/teacher-{seed}", f"run.seed={seed}", f"tokenizer.vocabulary={400 + seed // 2}")
    given = [f"teacher.path={tmp_path}/teacher-1", f"tokenizer.path={tmp_path}/teacher-1/tokenizer"]
    train(config, *SHORT, *given)
    shutil.copytree(tmp_path / "teacher-1", tmp_path / "copy")
    train(config, *SHORT, f"teacher.path={tmp_path}/copy", f"tokenizer.path={tmp_path}/copy/tokenizer", "training.iterations=3", resume=True)
    with pytest.raises(DataError, match=r"teacher-2 has another content; restore"):
        train(config, *SHORT, f"teacher.path={tmp_path}/teacher-2", given[1], resume=True)
    with pytest.raises(DataError, match=r"teacher-2/tokenizer has another content; restore"):
        train(config, *SHORT, given[0], f"tokenizer.path={tmp_path}/teacher-2/tokenizer", resume=True)


def test_a_run_that_kept_no_contents(config: Path, tmp_path: Path) -> None:
    """As the versions before did: it resumes with the same paths, and from then on the contents are known."""
    train(config, *SHORT)
    (tmp_path / "run" / "contents.json").unlink()
    shutil.copy(tmp_path / "train.tsv", tmp_path / "moved.tsv")
    with pytest.raises(ConfigError, match=r"data\.train\.tsv"):
        train(config, *SHORT, "data.train.tsv=moved.tsv", resume=True)
    train(config, *SHORT, resume=True)
    train(config, *SHORT, "data.train.tsv=moved.tsv", resume=True)
