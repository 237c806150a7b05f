"""What a model is to become: the scheme of its matrices, the method that chooses their values, and what stays as it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from cvmk.config.model import KvCache
from cvmk.errors import ConfigError
from cvmk.quantization.rounding import Grid

SchemeName = Literal["w8a8", "w4a16", "w4a8"]
Method = Literal["rtn", "smoothquant", "gptq", "awq"]
Part = Literal["embeddings", "output", "cross"]


@dataclass(frozen=True)
class Recipe:
    """How to quantise a model.

    scheme         w8a8: 8-bit weights by rows, activations by tokens in 8 bits. w4a16: 4-bit weights in groups, activations as they are. w4a8: both.
    method         rtn: round to nearest. smoothquant, gptq, awq: see the modules of these names.
    group_size     inputs of a scale, of 4-bit weights: 32, 64 or 128; 0: 64 for w4a16 and 32 for w4a8.
    symmetric      4-bit weights without zero points; None: without for w4a8, which has none, and with them for w4a16.
    keep           parts that stay in floats: "embeddings" and "output" (where they are one matrix, either), "cross" (cross-attention).
    damping, act_order, static_groups     of gptq.
    kv_cache       "int8": the decoder keeps keys and values in bytes while it decodes; the gate measures with them.
    static         w8a8: activations in 8 bits by one magnitude a layer, which calibration finds, and not by that of each token.

    Raises ConfigError for what does not go together.
    """

    scheme: SchemeName = "w8a8"
    method: Method = "rtn"
    group_size: int = 0
    symmetric: bool | None = None
    keep: tuple[Part, ...] = ()
    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    static: bool = False
    kv_cache: KvCache = "float"

    def __post_init__(self) -> None:
        allowed_values = {"scheme": get_args(SchemeName), "method": get_args(Method), "group_size": (0, 32, 64, 128), "kv_cache": get_args(KvCache)}
        for name, allowed in allowed_values.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, and must be one of {', '.join(map(str, allowed))}")
        unknown = [part for part in self.keep if part not in get_args(Part)]
        if unknown:
            raise ConfigError(f"keep has {unknown[0]!r}, and a model has the parts {', '.join(get_args(Part))}")
        if not 0 <= self.damping < float("inf"):
            raise ConfigError(f"damping is {self.damping}, and must be 0 or more, such as 0.01")
        if self.method == "smoothquant" and self.scheme == "w4a16":
            raise ConfigError("smoothquant makes activations easier to quantise, and w4a16 does not quantise them: choose w8a8 or w4a8, or gptq or awq")
        if self.method == "awq" and self.scheme == "w8a8":
            raise ConfigError("awq chooses the ranges of 4-bit weights: choose w4a16 or w4a8, or the method smoothquant or gptq")
        if self.static and self.scheme != "w8a8":
            raise ConfigError(f"static activation scales go with w8a8, and the scheme is {self.scheme}: leave them by tokens, or choose w8a8")
        if self.scheme == "w4a8" and (self.symmetric is False or not self.static_groups):
            raise ConfigError("w4a8 has weights without zero points, in groups of neighbours: leave symmetric and static_groups as they are, or choose w4a16")

    @property
    def group(self) -> int:
        """Inputs of a scale, of 4-bit weights."""
        return self.group_size or (32 if self.scheme == "w4a8" else 64)

    @property
    def bits(self) -> int:
        return 8 if self.scheme == "w8a8" else 4

    @property
    def activations(self) -> str:
        """As `QuantizedLinear` has them."""
        return "static" if self.static else "float" if self.scheme == "w4a16" else "token"

    def grid(self, columns: int) -> Grid:
        """The grid of a matrix of so many inputs."""
        if self.bits == 8:
            return Grid(8, columns)
        return Grid(4, self.group, self.scheme == "w4a8" if self.symmetric is None else self.symmetric)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
