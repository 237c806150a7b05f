"""The layer map: by rule, by list, and its errors."""

from __future__ import annotations

import pytest

from cvmk.config.schema import DistillationConfig, ModelConfig
from cvmk.distill.layer_map import attention_pairs, hidden_pairs, layer_pairs
from cvmk.errors import ConfigError
from cvmk.nn.mixers import MIXERS, Mixer

STUDENT = ModelConfig(encoder_layers=3, decoder_layers=1)
TEACHER = ModelConfig(encoder_layers=6, decoder_layers=4)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (3, 6, [1, 3, 5]),
        (2, 5, [2, 4]),
        (4, 4, [0, 1, 2, 3]),
        (1, 6, [5]),
        (4, 2, [0, 0, 1, 1]),
        (6, 1, [0] * 6),
    ],
)
def test_uniform(student: int, teacher: int, expected: list[int]) -> None:
    assert layer_pairs("uniform", student, teacher, "encoder") == list(enumerate(expected))


def test_last_and_list() -> None:
    assert layer_pairs("last", 3, 6, "encoder") == [(2, 5)]
    assert layer_pairs([(0, 5), (0, 1)], 3, 6, "encoder") == [(0, 5), (0, 1)]


@pytest.mark.parametrize(
    ("rule", "words"), [([(3, 0)], "layer 3 of the student's"), ([(0, 6)], "layer 6 of the teacher's"), ([(0, -1)], "layer -1"), ([], "empty")]
)
def test_a_layer_that_is_not_there(rule: list[tuple[int, int]], words: str) -> None:
    with pytest.raises(ConfigError, match=r"distillation\.layer_map.*" + words):
        layer_pairs(rule, 3, 6, "encoder")


def test_pairs_of_all_stacks() -> None:
    config = DistillationConfig(layer_map="uniform")
    assert hidden_pairs(config, STUDENT, TEACHER) == [("encoder", 0, 1), ("encoder", 1, 3), ("encoder", 2, 5), ("decoder", 0, 3)]
    found = attention_pairs(DistillationConfig(attention=["cross", "encoder"], layer_map="last"), STUDENT, TEACHER)
    assert found == [("cross", 0, 3), ("encoder", 2, 5)]
    with pytest.raises(ConfigError, match=r"layer 2 of the student's decoder"):
        attention_pairs(DistillationConfig(attention=["cross"], layer_map=[(2, 3)]), STUDENT, TEACHER)


class WithoutMap(Mixer):
    """A mixer that returns no attention map; only its class is asked."""


class WithMap(Mixer):
    """One that does, and is not called "attention"."""

    has_attention_map = True


def test_blocks_without_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps are counted among the blocks that return one, whatever their mixers are called."""
    monkeypatch.setitem(MIXERS, "other", WithoutMap)
    monkeypatch.setitem(MIXERS, "window", WithMap)
    hybrid = ModelConfig.model_construct(encoder_layers=4, decoder_layers=2, encoder_mixers=["other", "attention"], decoder_mixers=["other"])
    assert attention_pairs(DistillationConfig(attention=["encoder"]), hybrid, TEACHER) == [("encoder", 0, 2), ("encoder", 1, 5)]
    assert attention_pairs(DistillationConfig(attention=["encoder"], layer_map=[(3, 2)]), hybrid, TEACHER) == [("encoder", 1, 2)]
    assert attention_pairs(DistillationConfig(attention=["cross"]), hybrid, TEACHER) == [("cross", 0, 1), ("cross", 1, 3)]
    with pytest.raises(ConfigError, match=r"distillation\.layer_map pairs encoder layers 0 and 2"):
        attention_pairs(DistillationConfig(attention=["encoder"], layer_map=[(0, 2)]), hybrid, TEACHER)
    windows = ModelConfig.model_construct(encoder_layers=3, decoder_layers=1, encoder_mixers=["window", "other"], decoder_mixers=["window"])
    assert attention_pairs(DistillationConfig(attention=["encoder"]), windows, TEACHER) == [("encoder", 0, 2), ("encoder", 1, 5)]
    with pytest.raises(ConfigError, match='"decoder", but the student'):
        attention_pairs(DistillationConfig(attention=["decoder"]), hybrid, TEACHER)


def test_encoders_of_two_directions_have_no_maps_in_common() -> None:
    causal = ModelConfig(encoder_layers=3, encoder_direction="causal")
    assert attention_pairs(DistillationConfig(attention=["cross", "decoder"]), causal, TEACHER)
    assert attention_pairs(DistillationConfig(attention=["encoder"], layer_map="last"), causal, causal) == [("encoder", 2, 2)]
    for student, teacher, words in ((causal, TEACHER, "encoder is causal and the teacher's bidirectional"), (TEACHER, causal, "is bidirectional")):
        with pytest.raises(ConfigError, match=r'distillation\.attention names "encoder".*' + words + ".*leave it out"):
            attention_pairs(DistillationConfig(attention=["cross", "encoder"]), student, teacher)


def test_weights_of_nothing() -> None:
    with pytest.raises(ConfigError, match=r"distillation\.hidden names no stack"):
        hidden_pairs(DistillationConfig(beta=1.0, hidden=[]), STUDENT, TEACHER)
    with pytest.raises(ConfigError, match=r"distillation\.attention names no map"):
        attention_pairs(DistillationConfig(gamma=1.0, attention=[]), STUDENT, TEACHER)
