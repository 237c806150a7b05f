"""Names that moved are still found where they were, with a warning that says where they are."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

MOVED = [
    ("cvmk.text.tokenizer", "cvmk.text.tokenizers", ("Tokenizer", "load_tokenizer", "train_tokenizer")),
    ("cvmk.text.languages", "cvmk.config.languages", ("check_language",)),
    ("cvmk.text.corpus", "cvmk.config.languages", ("check_language",)),
    ("cvmk.inference", "cvmk.formats", ("load_model_folder", "save_model_folder")),
    ("cvmk.training.optimizer", "cvmk.training.optimizers", ("build_optimizer",)),
    ("cvmk.inference.model_folder", "cvmk.formats", ("load_model_folder", "save_model_folder")),
]


@pytest.mark.parametrize(("old", "new", "names"), MOVED, ids=lambda value: value if isinstance(value, str) else "")
def test_old_names_work_and_warn(old: str, new: str, names: tuple[str, ...]) -> None:
    for name in names:
        with pytest.warns(DeprecationWarning, match=rf"{old}\.{name} is now {new}\.{name}"):
            found = getattr(importlib.import_module(old), name)
        assert found is getattr(importlib.import_module(new), name)
    assert not hasattr(importlib.import_module(old), "nothing")


def test_the_warning_names_the_line_that_imports() -> None:
    code = "from cvmk.text.tokenizer import load_tokenizer"
    told = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True).stderr
    assert "<string>:1: DeprecationWarning" in told and "cvmk.text.tokenizers" in told


def test_a_name_that_changed() -> None:
    import cvmk.files

    with pytest.warns(DeprecationWarning, match=r"cvmk\.files\.open_maybe_gzip is now cvmk\.files\.open_input"):
        assert cvmk.files.open_maybe_gzip is cvmk.files.open_input
    assert not hasattr(cvmk.files, "other")
