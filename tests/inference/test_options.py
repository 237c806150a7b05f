"""Each option of a search is defined once: its limits, and the same name and default wherever it is offered."""

from __future__ import annotations

import argparse
import inspect
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from cvmk.cli import translate
from cvmk.errors import ConfigError
from cvmk.inference import Translator
from cvmk.inference.options import SearchOptions, option_help, scalar_options


@pytest.mark.parametrize(("option", "value"), [
    ("beam_size", 0), ("beam_size", 10**6), ("beam_size", 2.5), ("beam_size", True), ("beam_size", "2"), ("beam_size", math.nan), ("n_best", 0), ("n_best", 2),
    ("length_penalty", -1.0), ("length_penalty", math.nan), ("length_penalty", 1e300), ("length_penalty", "1"), ("length_penalty", None),
    ("no_repeat_ngram", -1), ("no_repeat_ngram", 1.0), ("max_length_a", math.inf), ("max_length_a", -0.1), ("max_length_b", -3), ("min_length", -1),
    ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", math.nan), ("repetition_penalty", math.inf),
    ("repetition_penalty", 1e30), ("suppressed", 5), ("suppressed", ["x"]), ("suppressed", "56"),
    ("shortlist", "yes"), ("shortlist", None), ("alignments", 2), ("alignments", 1.0),
    ("suppressed", (3,)), ("suppressed", (-1,)), ("suppressed", [5.0]),
])  # fmt: skip
def test_options_out_of_range_are_named(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{option} "):
        SearchOptions(**{option: value})


def test_values_of_other_numeric_types() -> None:
    found = SearchOptions(np.int64(3), length_penalty=np.float32(0.5), max_length_a=2, suppressed=np.array([9, 5, 9]))
    assert found == SearchOptions(3, length_penalty=0.5, max_length_a=2.0, suppressed=(5, 9)) and hash(found) == hash(SearchOptions(**vars(found)))
    assert SearchOptions(alignments=np.True_, shortlist=0) == SearchOptions(alignments=True)
    assert type(found.beam_size) is int and type(found.max_length_a) is float and found.suppressed == (5, 9)


@pytest.mark.parametrize(("options", "source", "expected"), [
    ({}, 5, 30), ({}, 50, 99), ({"max_length_a": 0, "max_length_b": 0}, 5, 1), ({"min_length": 40}, 5, 40), ({"min_length": 400}, 5, 99),
    ({"max_length_a": 1e308}, 50, 99), ({"max_length_b": 10**400}, 5, 99), ({"min_length": 0, "max_length_a": 0, "max_length_b": 0}, 5, 0),
    ({"max_length_a": 1.5, "max_length_b": 1}, 3, 5),
])  # fmt: skip
def test_the_limit_of_a_translation(options: dict[str, Any], source: int, expected: int) -> None:
    assert SearchOptions(**options).limit(source, 100) == expected


def test_translate_takes_every_option_with_its_default() -> None:
    keywords = inspect.signature(Translator.translate).parameters
    assert {option.name: keywords[option.name].default for option in fields(SearchOptions)} == vars(SearchOptions())
    assert all(option_help(option.name) for option in fields(SearchOptions))


def test_the_command_line_has_every_number_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    translate.add_arguments(parser)
    given = vars(parser.parse_args(["model"]))
    expected = {option.name: option.default for option in scalar_options() if option.name != "prefix_bias"}  # its texts have no prefixes
    assert {name: given[name] for name in expected} == expected
