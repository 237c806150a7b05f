"""The soak of benchmarks/soak.py on a model of random weights: short, so that it goes on working, and long, for its verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
from new_process import said

from cvmk.formats import save_model_folder

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
CODE = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def soak(folder: Path, make_model, tokenizer, *options: str) -> str:
    save_model_folder(folder, make_model(tokenizer.vocab_size, sharpness=2.0), tokenizer, "")
    return said(CODE, str(SOAK), str(folder), *options, seconds=1000)


def test_a_short_soak(tmp_path: Path, make_model, tokenizer) -> None:
    told = soak(tmp_path, make_model, tokenizer, "--sentences", "300", "--allowed", "1000").splitlines()
    assert len(told) > 10 and told[-1].startswith("3") and "are held" in told[-1]


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_memory_is_steady(tmp_path: Path, make_model, tokenizer) -> None:
    """Exit code 1 would say that it is not."""
    (tmp_path / "text").write_text("".join(f"{'a man rides a horse ' * (1 + length % 7)}two men\n" for length in range(50)))  # a tokenizer remembers words
    soak(tmp_path / "model", make_model, tokenizer, "--sentences", "60000", "--threads", "2", "--allowed", "4", "--text", str(tmp_path / "text"))
