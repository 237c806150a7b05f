"""Overrides end up in the text that a run keeps: as a changed line where that is enough."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmk.config.overrides import apply_overrides, dumps, with_overrides
from cvmk.errors import ConfigError

TEXT = """\
# a first comment
[run]
folder = "runs/a"  # where
[data]
train = { source = "a.en", target = "a.de" }
[training]
iterations = 5
max_tokens = 100
[teacher.model]
heads = 2"""


def said(text: str, *overrides: str) -> str:
    wanted = tomllib.loads(text)
    apply_overrides(wanted, overrides)
    result = with_overrides(text, overrides)
    assert tomllib.loads(result) == wanted
    return result


def test_lines_are_changed_and_added() -> None:
    new = ["training.log_every=3", "teacher.model.ffn=8", "model.layer_map=[[0, 1]]", "guard.window=3"]
    result = said(TEXT, "training.iterations=7", "run.folder=runs/b c", *new)
    assert result.startswith('# a first comment\n[run]\nfolder = "runs/b c"  # --set\n')
    assert "max_tokens = 100\n" in result and "iterations = 5" not in result and "train = { source" in result
    assert with_overrides(TEXT, []) == TEXT


@pytest.mark.parametrize("text", [
    '[data]\ntrain = { source = "a.en", target = "a.de" }\n',
    '[data.train]\nsource = "a.en"\ntarget = "a.de"\n',
    '[data]\ntrain.source = "a.en"\n',
    'data.train.source = "a.en"\n',
    'data = { train = { source = "a" } }\n',
    '["data".\'train\']\n"source" = "x"\n',
    '[data.train]\r\nsource = "a.en" # x\r\n',
    '[data.train]\nsource = """\n[data.train]\nsource = 5\n"""\n',
    '[data.train]\nsource = [\n  "a",\n  "b",\n]\n',
    "",
    "# nothing",
])  # fmt: skip
def test_however_the_key_was_written(text: str) -> None:
    assert tomllib.loads(said(text, 'data.train.source="b"'))["data"]["train"]["source"] == "b"
    assert tomllib.loads(said(text, "data.train.other=b", "x=1"))["x"] == 1


def test_wrong_overrides() -> None:
    for wrong in ("a", "=1", "a.=1", ".a=1"):
        with pytest.raises(ConfigError, match="not of the form"):
            with_overrides(TEXT, [wrong])
    with pytest.raises(ConfigError, match="iterations is a value, not a table"):
        with_overrides(TEXT, ["training.iterations.x=1"])


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.one_of(st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), TEXTS, st.dates(), st.times())
VALUES = st.recursive(PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=12)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), VALUES, max_size=5))
def test_values_survive(values: dict[str, object]) -> None:
    assert tomllib.loads(dumps(values)) == values
