from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command

from cvmk.text.phrasebook import phrasebook

TINY = """
[run]
folder = "{folder}/run"
device = "cpu"
threads = 1
report = false

[data]
folder = "{folder}"
train = {{ tsv = "train.tsv" }}
valid = {{ tsv = "valid.tsv" }}
test = {{ tsv = "valid.tsv" }}
max_tokens_per_sentence = 100

[tokenizer]
vocabulary = 400

[model]
d_model = 32
ffn = 64
heads = 2
encoder_layers = 1
decoder_layers = 1
max_length = 128

[optimizer]
learning_rate = 3e-3

[schedule]
warmup = 10

[training]
iterations = 40
max_tokens = 500
save_every = 10
log_every = 10
average = 2

[validation]
validate_every = 20
max_sentences = 20
bootstrap = 50
patience = 0
"""

TEACHER = """
[teacher.model]
d_model = 48
ffn = 64
heads = 2
encoder_layers = 2
decoder_layers = 1
max_length = 128

[teacher.training]
iterations = 20
max_tokens = 500

[teacher.validation]
validate_every = 20
max_sentences = 20
bootstrap = 50

[distillation]
beta = 0.1
gamma = 0.1
"""


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    book = phrasebook(1000)
    pairs = list(zip(book.train.sources, book.train.targets, strict=True))
    return {
        "train.tsv": "".join(f"{source}\t{target}\n" for source, target in pairs[:400]),
        "valid.tsv": "".join(f"{source}\t{target}\n" for source, target in pairs[400:430]),
    }


@pytest.fixture
def config(tmp_path: Path, corpora: dict[str, str]) -> Path:
    """A configuration of a few seconds over files in tmp_path; the run's folder is tmp_path/run."""
    for name, text in corpora.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    path = tmp_path / "config.toml"
    path.write_text(TINY.format(folder=tmp_path), encoding="utf-8")
    return path


@pytest.fixture
def with_teacher(config: Path) -> Path:
    config.write_text(config.read_text(encoding="utf-8") + TEACHER, encoding="utf-8")
    return config


@pytest.fixture
def cvmk() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own."""

    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=100, **options)

    return run


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """run.threads counts for a whole process: later tests must not have it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
