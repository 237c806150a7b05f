"""Training steps of examples/multi30k/student.toml on a GPU: with cvmk's backends, plain PyTorch, and torch.compile. Run by contestants.py.

The batch is drawn (sentences of 8 to 24 tokens, 2048 tokens with padding, as `training.max_tokens` says) and stays on the device: what is
timed is teacher, student, objective, backward pass and optimiser.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cvmk import ops
from gpu.contestants import Row

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "multi30k"
VOCABULARY, LONGEST = 8000, 24


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    sentences = 4 if small else 2048 // LONGEST
    batch = _batch(device, sentences)
    step, compiled = _step(device, batch, False), _step(device, batch, True)

    def plain() -> None:
        with ops.use("reference"):
            step()

    def plain_compiled() -> None:
        with ops.use("reference"):
            compiled()

    peers: dict[str, Any] = {"plain PyTorch": plain}
    if not small:
        peers |= {"torch.compile, plain": plain_compiled, "torch.compile, cvmk": compiled}
    yield Row("training step", f"student.toml, {sentences} sentences", step, peers, host=True)


def _batch(device: torch.device, sentences: int) -> Any:
    from cvmk.text.batching import Batch

    source, target = (torch.randint(8, LONGEST + 1, (sentences,)) for _ in range(2))
    source[0] = target[0] = LONGEST
    ids = [torch.randint(4, VOCABULARY, (sentences, LONGEST)) for _ in range(3)]
    for tensor, lengths in zip(ids, (source, target, target), strict=True):
        tensor[torch.arange(LONGEST) >= lengths[:, None]] = 0
    return Batch(*ids, source, target, torch.arange(sentences), int(target.sum())).to(device)


def _step(device: torch.device, batch: Any, compiled: bool) -> Callable[[], None]:
    from cvmk.config.schema import DistillationConfig, ModelConfig
    from cvmk.distill import DistillationObjective
    from cvmk.nn import CVMTransformer

    files = [tomllib.loads((EXAMPLES / name).read_text()) for name in ("student.toml", "teacher.toml")]
    configs = [ModelConfig(**file["model"]) for file in files]
    student, teacher = (CVMTransformer(config, VOCABULARY).to(device) for config in configs)
    objective = DistillationObjective(
        DistillationConfig(**files[0]["distillation"]), label_smoothing=0.1, student=configs[0], teacher=configs[1], vocab_size=VOCABULARY
    ).to(device)
    teacher.eval()
    parameters = [*student.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
    wants = {"return_hidden": objective.needs_hidden, "return_attention": objective.needs_attention}

    def losses() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                taught = teacher(batch.src, batch.tgt_in, **wants)
            return objective(student(batch.src, batch.tgt_in, **wants), taught, batch).total

    forward = torch.compile(losses) if compiled else losses

    def step() -> None:
        forward().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
