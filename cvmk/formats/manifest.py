"""A model's manifest, `config.json`: what the model is, how its weights are stored, and what a reader has to know.

    format            2
    requires          features that a reader must know, or it would read the folder wrongly; sorted
    cvmk              version that wrote it
    model             the keys of ModelConfig
    vocab_size, pad_id, parameters
    tokenizer         fingerprint of the tokenizer
    schemes           {"default": scheme, "weights": {name: scheme, ...}}: the scheme of each weight; `weights` holds the exceptions
    weights_sha256    checksum of model.safetensors; a checkpoint has null
    languages         {"source": code, "target": code}, or null
    and whatever else the writer adds.

A scheme is {"type": name, option: value, ...}. Those of FLOATS have no options and store a weight as one tensor of that dtype. Those of QUANTIZED
store it as the tensors of `stored`:
    int8     one scale an output; rows of activations are quantised to 8 bits, "activations": "token", each by its largest magnitude, or "static", all by
             one that stands beside the weight
    int4     "group": inputs of a scale, 32, 64 or 128; "activations": "float", as they are, or "token", quantised to 8 bits by rows; "zeros" and
             "order": whether the weight has zero points and an order of its inputs (with "token" neither)
Format 1 has neither `requires` nor `schemes`: the tensors' dtypes say how they are stored.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

import cvmk
from cvmk.config.model import Mixer, ModelConfig
from cvmk.errors import DataError
from cvmk.files import read_json

FORMAT = 2
READABLE = (1, 2)
CONFIG = "config.json"
FLOATS = ("float32", "float64", "bfloat16", "float16")
QUANTIZED = ("int8", "int4")
SCHEMES: dict[str, frozenset[str]] = {
    **{name: frozenset() for name in FLOATS},
    "int8": frozenset({"activations"}),
    "int4": frozenset({"activations", "group", "zeros", "order"}),
}
"""The types of schemes that this version reads, with the options that each must have."""
_OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "int8": {"activations": ("token", "static")},
    "int4": {"activations": ("float", "token"), "group": (32, 64, 128), "zeros": (False, True), "order": (False, True)},
}
"""The values that an option may have."""
_BASE = frozenset({"scheme:float32", "mixer:attention", "encoder:bidirectional", "positions:sinusoidal", "positions:rotary", "kv_cache:float"})
"""What every reader of a format knows, so that nobody has to require it."""
_REMEDY = "restore it or save the model again"


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored. `options` belong to the type, such as the size of a group."""

    type: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, **self.options}

    @classmethod
    def from_dict(cls, value: Any) -> Scheme:
        """Raises ValueError, with what is wrong, for what is no scheme of this version."""
        if not isinstance(value, dict) or not isinstance(value.get("type"), str):
            raise ValueError("a scheme has no type")
        options = {key: option for key, option in value.items() if key != "type"}
        if value["type"] not in SCHEMES:
            raise ValueError(f"the scheme {value['type']!r} is unknown to cvmk {cvmk.__version__}")
        if options.keys() != SCHEMES[value["type"]]:
            raise ValueError(f"the scheme {value['type']!r} has the options {sorted(options)} and not {sorted(SCHEMES[value['type']])}")
        for key, allowed in _OPTIONS.get(value["type"], {}).items():
            if not any(type(options[key]) is type(one) and options[key] == one for one in allowed):
                raise ValueError(f"the scheme {value['type']!r} has {key} = {options[key]!r} and not one of {', '.join(map(repr, allowed))}")
        if value["type"] == "int4" and options["activations"] == "token" and (options["zeros"] or options["order"]):
            raise ValueError("the scheme 'int4' has zeros or an order, and activations by tokens go with neither")
        return cls(value["type"], options)


@dataclass(frozen=True)
class Schemes:
    """The scheme of each weight: `default`, but for those in `weights`."""

    default: Scheme
    weights: Mapping[str, Scheme] = field(default_factory=dict)

    def of(self, weight: str) -> Scheme:
        return self.weights.get(weight, self.default)

    @classmethod
    def of_weights(cls, schemes: Mapping[str, Scheme]) -> Schemes:
        """From the scheme of every weight: the commonest type becomes the default."""
        if not schemes:
            raise ValueError("a model has at least one weight")
        common = Counter(scheme.type for scheme in schemes.values()).most_common(1)[0][0]
        default = next(scheme for scheme in schemes.values() if scheme.type == common)
        return cls(default, {name: scheme for name, scheme in schemes.items() if scheme != default})

    def to_dict(self) -> dict[str, Any]:
        return {"default": self.default.to_dict(), "weights": {name: scheme.to_dict() for name, scheme in self.weights.items()}}

    @classmethod
    def from_dict(cls, value: Any) -> Schemes:
        """Raises ValueError, with what is wrong."""
        if not isinstance(value, dict) or not isinstance(value.get("weights"), dict):
            raise ValueError("it lists no weights")
        return cls(Scheme.from_dict(value.get("default")), {name: Scheme.from_dict(scheme) for name, scheme in value["weights"].items()})


@dataclass(frozen=True)
class Manifest:
    """What config.json says. `schemes` is None in format 1; `extra` is what the writer added, such as `languages`."""

    model: ModelConfig
    vocab_size: int
    pad_id: int
    parameters: int | None
    tokenizer: str
    schemes: Schemes | None
    weights_sha256: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    requires: tuple[str, ...] = ()
    cvmk: str = cvmk.__version__

    def to_dict(self) -> dict[str, Any]:
        """config.json in this version's format, with everything that the model requires. Raises ValueError where `extra` has a key of its own."""
        if self.schemes is None:
            raise ValueError("a manifest of format 1 is only read: give the schemes of the weights")
        own = {
            "format": FORMAT,
            "requires": sorted({*self.requires, *_features(self.model, self.schemes)}),
            "cvmk": self.cvmk,
            "model": self.model.model_dump(),
            "vocab_size": self.vocab_size,
            "pad_id": self.pad_id,
            "parameters": self.parameters,
            "tokenizer": self.tokenizer,
            "schemes": self.schemes.to_dict(),
            "weights_sha256": self.weights_sha256,
        }
        taken = sorted(own.keys() & self.extra.keys())
        if taken:
            raise ValueError(f"extra has the key {taken[0]!r}, which {CONFIG} already has: choose another name")
        return {**own, "languages": None, **self.extra}


def read_manifest(file: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest in a file, and the file's whole content. Raises DataError for one that is corrupt, newer, or requires what is not known here."""
    info = read_json(file)
    if not isinstance(info, dict) or "format" not in info:
        raise DataError(f"{file} describes no model: {_REMEDY}")
    _check_readable(info, file)
    for key, kind in (("vocab_size", int), ("pad_id", int), ("tokenizer", str), ("model", dict)):
        if type(info.get(key)) is not kind:
            raise DataError(f"{file} has no valid key {key!r}: {_REMEDY}")
    for key, least, most in (("vocab_size", 1, None), ("pad_id", 0, info["vocab_size"] - 1)):
        if info[key] < least or (most is not None and info[key] > most):
            raise DataError(f"{file} has no valid key {key!r} (it is {info[key]}): {_REMEDY}")
    checksum = info.get("weights_sha256")
    if checksum is not None and not isinstance(checksum, str):
        raise DataError(f"{file} has no valid key 'weights_sha256': {_REMEDY}")
    known = {member.name for member in dataclasses.fields(Manifest)}
    return Manifest(
        model=_model_config(info["model"], file),
        vocab_size=info["vocab_size"],
        pad_id=info["pad_id"],
        parameters=info.get("parameters"),
        tokenizer=info["tokenizer"],
        schemes=_schemes(info, file),
        weights_sha256=checksum,
        extra={key: value for key, value in info.items() if key not in known},
        format=info["format"],
        requires=() if info["format"] == 1 else tuple(info["requires"]),
        cvmk=str(info.get("cvmk")),
    ), info


def known_features() -> frozenset[str]:
    """The features that a folder may require of this version."""
    later = {"encoder:causal", "positions:none", "kv_cache:int8"}
    return _BASE | later | {f"scheme:{name}" for name in SCHEMES} | {f"mixer:{name}" for name in get_args(Mixer)}


def _features(model: ModelConfig, schemes: Schemes) -> set[str]:
    mixers = {*model.encoder_mixers, *model.decoder_mixers}
    types = {scheme.type for scheme in (schemes.default, *schemes.weights.values())}
    kinds = {f"encoder:{model.encoder_direction}", f"positions:{model.positions}", f"kv_cache:{model.kv_cache}"}
    return {*(f"mixer:{name}" for name in mixers), *(f"scheme:{name}" for name in types), *kinds} - _BASE


def _check_readable(info: dict[str, Any], file: Path) -> None:
    newer = f"use the cvmk version that wrote it ({info.get('cvmk')}) or a later one"
    if type(info["format"]) is not int or info["format"] not in READABLE:
        raise DataError(f"{file} has format {info['format']!r} and this cvmk ({cvmk.__version__}) reads formats {_and(map(str, READABLE))}: {newer}")
    if info["format"] == 1:
        return
    requires = info.get("requires")
    if not isinstance(requires, list) or not all(isinstance(feature, str) for feature in requires):
        raise DataError(f"{file} has no valid key 'requires': {_REMEDY}")
    unknown = [feature for feature in requires if feature not in known_features()]
    if unknown:
        raise DataError(f"{file} requires {_and(map(repr, unknown))}, which this cvmk ({cvmk.__version__}) does not know: {newer}")


def _model_config(value: dict[str, Any], file: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{file} has a wrong model.{'.'.join(map(str, first['loc']))} ({first['msg']}): {_REMEDY}") from error


def _schemes(info: dict[str, Any], file: Path) -> Schemes | None:
    if info["format"] == 1:
        return None
    try:
        return Schemes.from_dict(info.get("schemes"))
    except ValueError as error:
        raise DataError(f"{file} has no valid key 'schemes' ({error}): {_REMEDY}") from error


def _and(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
