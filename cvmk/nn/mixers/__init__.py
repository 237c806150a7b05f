"""What mixes positions inside a block, by name.

A mixer is one file with one class (see `base.Mixer`), an entry here, and its name and letter in `config.model`.
"""

from __future__ import annotations

from cvmk.config.schema import ModelConfig
from cvmk.nn.mixers.attention import CrossAttention, SelfAttention
from cvmk.nn.mixers.base import Mixer
from cvmk.nn.mixers.hyena import Hyena
from cvmk.nn.mixers.mamba import Mamba
from cvmk.nn.mixers.mamba2 import Mamba2
from cvmk.nn.mixers.retnet import RetNet
from cvmk.nn.mixers.rwkv import RWKV
from cvmk.nn.mixers.ssru import SSRU
from cvmk.nn.state import MixerState

MIXERS: dict[str, type[Mixer]] = {
    "attention": SelfAttention,
    "hyena": Hyena,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "retnet": RetNet,
    "rwkv": RWKV,
    "ssru": SSRU,
}

__all__ = ["MIXERS", "CrossAttention", "Mixer", "MixerState", "SelfAttention", "build_mixer", "mixer_class", "mixer_names"]


def mixer_names(names: list[str], blocks: int) -> list[str]:
    """The mixer of each block: `names` repeated in order until there are `blocks` of them."""
    return [names[index % len(names)] for index in range(blocks)]


def mixer_class(name: str) -> type[Mixer]:
    """The mixer called `name`. Raises ValueError for an unknown name."""
    if name not in MIXERS:
        raise ValueError(f"there is no mixer {name!r}; the mixers are {', '.join(sorted(MIXERS))}")
    return MIXERS[name]


def build_mixer(name: str, config: ModelConfig, causal: bool) -> Mixer:
    """A mixer of the kind called `name`; `causal` where a position must not see later ones. Raises ValueError for an unknown name."""
    return mixer_class(name)(config, causal)
