"""Which teacher layer a student layer imitates."""

from __future__ import annotations

import math

from cvmk.config.schema import DistillationConfig, LayerMap, ModelConfig
from cvmk.errors import ConfigError
from cvmk.nn.mixers import mixer_class, mixer_names

KEY = "distillation.layer_map"


def layer_pairs(rule: LayerMap, student_layers: int, teacher_layers: int, stack: str) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer), counted from 0, of one stack ("encoder", "decoder").

    "uniform" spreads the student's layers over the teacher's so that the last ones meet: student i, teacher
    floor((i + 1) * teacher_layers / student_layers + 1/2) - 1, at least 0. "last" pairs the last ones only. Pairs are taken as
    they are. Raises ConfigError for an empty list or a layer that is not there.
    """
    if rule == "last":
        return [(student_layers - 1, teacher_layers - 1)]
    if rule == "uniform":
        return [(i, max(0, math.floor((i + 1) * teacher_layers / student_layers + 0.5) - 1)) for i in range(student_layers)]
    if not rule:
        raise ConfigError(f'{KEY} is an empty list: give pairs [student, teacher], "uniform" or "last"')
    for student, teacher in rule:
        for who, layer, count in (("student", student, student_layers), ("teacher", teacher, teacher_layers)):
            if not 0 <= layer < count:
                raise ConfigError(f"{KEY} names layer {layer} of the {who}'s {stack}, which has layers 0 to {count - 1}")
    return [(student, teacher) for student, teacher in rule]


def hidden_pairs(config: DistillationConfig, student: ModelConfig, teacher: ModelConfig) -> list[tuple[str, int, int]]:
    """(stack, student layer, teacher layer) of every hidden state that is compared."""
    if not config.hidden:
        raise ConfigError(f"distillation.beta is {config.beta}, but distillation.hidden names no stack: name one, or set beta to 0")
    return [(stack, s, t) for stack in config.hidden for s, t in layer_pairs(config.layer_map, _layers(student, stack), _layers(teacher, stack), stack)]


def attention_pairs(config: DistillationConfig, student: ModelConfig, teacher: ModelConfig) -> list[tuple[str, int, int]]:
    """(kind, student map, teacher map) of every attention that is compared, counted among the maps that a model returns.

    A block whose mixer has no attention map returns none of its own: rules then count the blocks that do, and naming another one
    in a list of pairs raises ConfigError.
    """
    if not config.attention:
        raise ConfigError(f"distillation.gamma is {config.gamma}, but distillation.attention names no map: name one, or set gamma to 0")
    found: list[tuple[str, int, int]] = []
    if "encoder" in config.attention and student.encoder_direction != teacher.encoder_direction:
        raise ConfigError(
            f'distillation.attention names "encoder", but the student\'s encoder is {student.encoder_direction} and the teacher\'s '
            f"{teacher.encoder_direction}, whose maps have nothing in common: leave it out"
        )
    for kind in config.attention:
        ours, theirs = _attention_blocks(student, kind), _attention_blocks(teacher, kind)
        if not ours or not theirs:
            raise ConfigError(f'distillation.attention names "{kind}", but the {"teacher" if ours else "student"} has no such attention: leave it out')
        if isinstance(config.layer_map, str):
            found += [(kind, s, t) for s, t in layer_pairs(config.layer_map, len(ours), len(theirs), kind)]
            continue
        stack = "decoder" if kind == "cross" else kind
        for s, t in layer_pairs(config.layer_map, _layers(student, stack), _layers(teacher, stack), stack):
            if s not in ours or t not in theirs:
                raise ConfigError(f"{KEY} pairs {stack} layers {s} and {t}, but not both have an attention map: pair others, or set distillation.gamma to 0")
            found.append((kind, ours.index(s), theirs.index(t)))
    return found


def _layers(model: ModelConfig, stack: str) -> int:
    return model.encoder_layers if stack == "encoder" else model.decoder_layers


def _attention_blocks(model: ModelConfig, kind: str) -> list[int]:
    """The blocks that return a map of the kind."""
    if kind == "cross":
        return list(range(model.decoder_layers))
    names = mixer_names([*(model.encoder_mixers if kind == "encoder" else model.decoder_mixers)], _layers(model, kind))
    return [i for i, name in enumerate(names) if mixer_class(name).has_attention_map]
