"""What a run trains on: corpora, the tokenizer, and the teacher's translations."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cvmk.config import DataConfig, TokenizerConfig
from cvmk.files import explained, read_bytes, write_text
from cvmk.inference import Translator
from cvmk.report.names import RESOLVED
from cvmk.telemetry import Reporter
from cvmk.text.corpus import ParallelCorpus, read_corpus
from cvmk.text.lines import one_line, trimmed
from cvmk.text.phrasebook import phrasebook
from cvmk.text.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

_CHUNK = 512


@dataclass(frozen=True)
class Corpora:
    """Training, validation and (perhaps) test pairs."""

    train: ParallelCorpus
    valid: ParallelCorpus
    test: ParallelCorpus | None


def load_corpora(config: DataConfig) -> Corpora:
    """Read or generate what `[data]` names. Raises DataError for unusable files."""
    if config.embedded is not None:
        book = phrasebook(config.phrasebook_pairs)
        return Corpora(book.train, book.valid, book.test)
    assert config.train is not None and config.valid is not None
    return Corpora(
        read_corpus(config.train, config, "data.train", training=True),
        read_corpus(config.valid, config, "data.valid", training=False),
        read_corpus(config.test, config, "data.test", training=False) if config.test is not None else None,
    )


def prepare_tokenizer(config: TokenizerConfig, corpus: ParallelCorpus, folder: Path, seed: int, reporter: Reporter) -> Tokenizer:
    """The tokenizer that this run has trained before, in `folder`, or a new one trained on both sides of `corpus`."""
    if (folder / "done").exists():
        return load_tokenizer(folder)
    reporter.say(f"training a {config.kind} tokenizer of {config.vocabulary} pieces on {len(corpus.sources)} pairs")
    tokenizer = train_tokenizer([*corpus.sources, *corpus.targets], config, seed)
    tokenizer.save(folder)
    write_text(folder / "done", tokenizer.fingerprint + "\n")
    return tokenizer


def teacher_translations(
    translator: Translator, fingerprint: str, sources: Sequence[str], beam_size: int, folder: Path, name: str, reporter: Reporter
) -> list[str]:
    """The teacher's translations of `sources`, made once: a file in `folder`, named by teacher, sources and beam, is reused, and a
    file that an interruption left unfinished is continued.

    They are kept as the teacher said them, as sentences of a corpus are: without line breaks, and without white space around them.
    """
    asked = [fingerprint, beam_size, list(sources)]
    done, _ = _whole_lines(_file(folder, name, asked))
    if len(done) == len(sources) and (folder.parent / RESOLVED).exists():
        return done  # what this run was trained on before: an older cvmk made one space of all white space
    path = _file(folder, name, [*asked, "as said"])
    done, size = _whole_lines(path)
    if len(done) < len(sources):
        with explained(path, "write"):
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(path) as file, reporter.progress(f"teacher translates {name}", len(sources), len(done)) as bar:
                done, size = _whole_lines(path)  # another process may have made them meanwhile
                file.truncate(size)
                for start in range(len(done), len(sources), _CHUNK):
                    found = translator.translate(list(sources[start : start + _CHUNK]), beam_size=beam_size, on_long="truncate", scores=False)
                    texts = [trimmed(one_line(one.text)) for one in found]
                    file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
                    file.flush()
                    done += texts
                    bar.update(len(done), log=len(done) % (_CHUNK * 8) == 0)
    return done


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[IO[str]]:
    """The file, to append to, once no other process has it so: trials of a search share what their teacher says."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _file(folder: Path, name: str, asked: list[Any]) -> Path:
    return folder / f"teacher-{name}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.jsonl"


def _whole_lines(path: Path) -> tuple[list[str], int]:
    """The strings on the whole lines at the beginning of a file, and how many bytes these lines are."""
    texts: list[str] = []
    size = 0
    if path.exists():
        for line in read_bytes(path).splitlines(keepends=True):
            try:
                text = json.loads(line)
            except ValueError:
                break
            if not isinstance(text, str) or not line.endswith(b"\n"):
                break
            texts.append(text)
            size += len(line)
    return texts, size
