"""A Mamba language model of Hugging Face transformers on cvmk's scan and convolution: the same logits and gradients, several times sooner on the CPU.

`on_our_kernels(model)` is all that it takes. Run as a program it compares a model of random weights with itself, without and with it; `--width 768
--layers 24` is the size of the smallest published one.
"""

import argparse
import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvmk import ops


def mix(mixer: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
    """The forward pass of a `MambaMixer` over whole sequences [batch, length, width]; steps of generation, which have a cache, stay with the library."""
    if cache_params is not None:
        found: Tensor = type(mixer).forward(mixer, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **others)
        return found
    real = None if attention_mask is None else attention_mask[..., None].to(hidden_states.dtype)
    u, z = mixer.in_proj(hidden_states if real is None else hidden_states * real).chunk(2, dim=-1)
    u = ops.causal_conv1d(u, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, activation="silu", channels_last=True)
    u = u if real is None else u * real
    steps, B, C = mixer.x_proj(u).split((mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size), dim=-1)
    delta, A, bias = F.linear(steps, mixer.dt_proj.weight), -mixer.A_log.float().exp(), mixer.dt_proj.bias.float()
    mixed: Tensor = mixer.out_proj(ops.selective_scan(u, delta, A, B, C, mixer.D.float(), z, bias, delta_softplus=True, channels_last=True))
    return mixed


def on_our_kernels(model: Any) -> Any:
    """The model, whose Mamba layers now run on `cvmk.ops`. Raises ValueError for one that has none, or another activation than silu."""
    mixers = [module for module in model.modules() if type(module).__name__ == "MambaMixer"]
    if not mixers or any(mixer.activation != "silu" for mixer in mixers):
        raise ValueError("the model must have layers of the class MambaMixer whose activation is silu")
    for mixer in mixers:
        mixer.forward = MethodType(mix, mixer)
    return model


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """The shortest of some rounds."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def passes(model: Any, ids: Tensor) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """A forward pass without gradients, and a step of training."""

    def forward() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(ids, use_cache=False).logits
            return logits

    def step() -> None:
        model.zero_grad()
        logits = model(ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    return forward, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 64), ("layers", 2), ("vocabulary", 500), ("batch", 2), ("length", 64), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    asked = parser.parse_args()
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=asked.vocabulary, hidden_size=asked.width, num_hidden_layers=asked.layers, use_cache=False))
    model.to(getattr(torch, asked.dtype)).train()
    ids = torch.randint(asked.vocabulary, (asked.batch, asked.length))
    forward, step = passes(model, ids)
    theirs, logits = (seconds(forward, asked.rounds), seconds(step, asked.rounds)), forward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    on_our_kernels(model)
    ours = seconds(forward, asked.rounds), seconds(step, asked.rounds)
    apart = ((forward() - logits).norm() / logits.norm()).item()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradients_apart = max(((mine - want).norm() / want.norm()).item() for mine, want in zip(found, gradients, strict=True))
    print(f"logits differ by {apart:.1e}, gradients by {gradients_apart:.1e} of their norms")
    for name, before, after in zip(("forward", "training step"), theirs, ours, strict=True):
        print(f"{name}: {before:.3f} s -> {after:.3f} s, {before / after:.1f} times as fast")


if __name__ == "__main__":
    main()
