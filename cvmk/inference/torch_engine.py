"""The engine that runs a CVMTransformer with PyTorch."""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch

from cvmk.errors import ConfigError
from cvmk.inference.decoding import search
from cvmk.inference.options import Hypothesis, SearchOptions
from cvmk.nn import CVMTransformer
from cvmk.text.tokenizers import Tokenizer

ComputeType = Literal["float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes a GPU where there is one. Raises ConfigError where there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'device is {name!r}, and must be "auto", "cpu", "cuda" or "cuda:<number>"') from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f'device is {name!r}, and PyTorch sees {torch.cuda.device_count()} GPUs: use device "cpu" or another number')
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'device is {name!r}, and the torch engine runs on "cpu" and "cuda"')
    return device


def check_compute_type(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ConfigError(f"compute_type is {name!r}, and the torch engine has {' and '.join(get_args(ComputeType))}")
    return _DTYPES[name]


class TorchEngine:
    """Translates batches of piece ids. The model is put into evaluation mode while it works, and then as it was.

    device and compute_type None leave the model as it is, so that an engine made of a model in training always uses its
    present weights; otherwise the engine keeps a copy where the model has to be converted.
    """

    def __init__(self, model: CVMTransformer, device: str | None = None, compute_type: str | None = None) -> None:
        parameter = next(model.parameters())
        to_device = parameter.device if device is None else check_device(device)
        dtype = parameter.dtype if compute_type is None else check_compute_type(compute_type)
        if to_device.type == "cuda" and to_device.index is None and parameter.device.type == "cuda":
            to_device = parameter.device
        if (to_device, dtype) != (parameter.device, parameter.dtype):
            model = copy.deepcopy(model).to(device=to_device, dtype=dtype)
        self.model = model

    @property
    def max_length(self) -> int:
        """Longest source or target in pieces, with the special one at its end or beginning."""
        return self.model.config.max_length

    @torch.inference_mode()
    def search(self, sources: list[list[int]], options: SearchOptions) -> list[list[Hypothesis]]:
        """The hypotheses of each source (piece ids without special ones, at most max_length - 1 of them), best first."""
        model = self.model
        width = max(map(len, sources), default=0) + 1
        rows = [[*source, Tokenizer.EOS, *[model.pad_id] * (width - 1 - len(source))] for source in sources]
        device = next(model.parameters()).device
        limits = [options.limit(len(source), self.max_length) for source in sources]
        was_training = model.training
        if was_training:
            model.eval()
        try:
            return search(model, torch.tensor(rows, dtype=torch.long, device=device).view(len(sources), width), limits, options)
        finally:
            if was_training:
                model.train()
