"""What a space may be: found before the first trial."""

from __future__ import annotations

import pytest

from cvmk.cli import main
from cvmk.config.overrides import without_table
from cvmk.errors import ConfigError
from cvmk.search.setup import SearchSetup, parse_search

BASE = """
[data]
embedded = "phrasebook"

[search]
trials = 3

[search.space]
"""


def setup(space: str, before: str = "") -> SearchSetup:
    return parse_search(before + BASE + space, "s.toml")


def test_keys_by_quoted_names_and_by_tables_are_the_same():
    quoted = setup('"optimizer.learning_rate" = { low = 1e-4, high = 1 }\n"model.d_model" = { choices = [64, 128] }')
    nested = setup("optimizer.learning_rate = { low = 1e-4, high = 1.0 }\n[search.space.model.d_model]\nchoices = [64, 128]")
    assert list(quoted.space.keys) == ["optimizer.learning_rate", "model.d_model"]
    assert quoted.space.shown() == nested.space.shown()
    assert isinstance(quoted.space.shown()["optimizer.learning_rate"]["high"], float)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("optimizer.learning_rat = { low = 1e-4, high = 1 }", "no key of the configuration; did you mean optimizer.learning_rate?"),
        ("learning_rate = { low = 1e-4, high = 1 }", "did you mean optimizer.learning_rate?"),
        ("model = { low = 1e-4, high = 1 }", "which is a table: name one of its keys, such as model.d_model"),
        ("model.dropout = { low = 0, high = 1 }", "model.dropout = 1.0, which the configuration refuses: .* less than 1"),
        ("model.d_model = { low = 60, high = 96 }", r"model.d_model = 61, which the configuration refuses: model: heads \(4\) must divide d_model \(61\)"),
        ("model.d_model = { low = 64.5, high = 96 }", "holds a whole number, so low, high and step must be whole"),
        ("model.norm = { low = 1, high = 2 }", "the key holds no number, so it needs choices"),
        ('model.norm = { choices = ["layernorm", "rmsnrm"] }', 'model.norm = "rmsnrm", which the configuration refuses'),
        ('validation.metric = { choices = ["bleu", "ter"] }', "cannot be searched: trials that are scored in another way cannot be compared"),
        ('run.folder = { choices = ["a", "b"] }', "cannot be searched: each trial has a folder of its own"),
        ("distillation.alpha = { low = 0, high = 1 }", "does nothing without a teacher"),
        ("model.ffn = { low = 96, high = 64 }", r"low \(96\) must be below high \(64\)"),
        ("model.ffn = { low = 64 }", "a range needs low and high, or else choices"),
        ("model.ffn = { low = 64, hgh = 96 }", "unknown key search.space.model.ffn.hgh; did you mean search.space.model.ffn.high?"),
        ("model.ffn = { choices = [64, 64] }", "a choice stands there twice"),
        ("model.ffn = { choices = [64], low = 3 }", "choices stand alone"),
        ("optimizer.learning_rate = { low = 0, high = 1, log = true }", r"low \(0\) must be above 0 where log = true"),
        ("optimizer.learning_rate = { low = 1, high = 2, step = 0 }", "greater than 0"),
        ("", "at least one key is needed"),
    ],
)
def test_a_space_that_the_configuration_refuses(space: str, words: str):
    with pytest.raises(ConfigError, match=words) as refusal:
        setup(space)
    assert "\n" not in str(refusal.value) and "s.toml" in str(refusal.value)


def test_combinations_are_checked_too():
    """Each value is fine with the configuration's others."""
    with pytest.raises(ConfigError, match=r"model.d_model = 96, model.heads = 64, which the configuration refuses"):
        setup("model.d_model = { choices = [64, 96] }\nmodel.heads = { choices = [4, 64] }")
    fits = setup("model.d_model = { choices = [30, 60] }\nmodel.heads = { choices = [3, 5] }", "[model]\nd_model = 64\n")  # neither does alone
    assert fits.space.with_values({"model.heads": 5})["model"] == {"d_model": 64, "heads": 5}


def test_lists_are_choices():
    space = setup("optimizer.betas = { choices = [[0.9, 0.98], [0.9, 0.999]] }").space
    key = space.keys["optimizer.betas"]
    assert key.names_of_choices() == ["[0.9, 0.98]", "[0.9, 0.999]"] and key.value("[0.9, 0.999]") == [0.9, 0.999]


def test_a_search_needs_a_budget_and_a_table():
    with pytest.raises(ConfigError, match="a budget is needed: give trials, iterations or minutes"):
        parse_search(BASE.replace("trials = 3", "") + "model.ffn = { low = 64, high = 96 }", "s.toml")
    with pytest.raises(ConfigError, match=r"s.toml has no table \[search\]"):
        parse_search('[data]\nembedded = "phrasebook"\n', "s.toml")


def test_train_says_whose_table_it_is(tmp_path, capsys):
    path = tmp_path / "s.toml"
    path.write_text(BASE + "model.ffn = { low = 64, high = 96 }")
    assert main(["train", str(path)]) == 2
    assert "the table [search] is for `cvmk search`: use that, or take the table out" in capsys.readouterr().err
    assert main(["search", str(path), "--check"]) == 0
    assert "a search over model.ffn" in capsys.readouterr().out


def test_a_table_is_taken_out_of_the_text():
    text = "# head\n[a]\nx = 1  # one\n[search]\ny = 2\n[search.space.q]\nz = 1\n[b]  # last\nw = 4\n"
    assert without_table(text, "search") == "# head\n[a]\nx = 1  # one\n[b]  # last\nw = 4\n"
    assert without_table("search = { x = 1 }\n[a]\nx = 1\n", "search") == "\n[a]\nx = 1\n"
