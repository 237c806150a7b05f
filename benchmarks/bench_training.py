"""Training steps beside `nn.Transformer`: forward and backward pass, clipping and AdamW, from the same weights and on the same batch.

120 sentences of 13 to 17 tokens on both sides, V 8000, label smoothing 0.1. The step of cvmk is that of `cvmk train`; the peer's is `nn.Transformer`, eager and
compiled, with `F.cross_entropy` and `torch.optim.AdamW(fused=True)`, and drops where cvmk drops. "teacher" adds the logits of the teacher of examples/multi30k
(weight 0.7), whose forward pass is part of the step and made by the same library; "all of the teacher" its hidden states and attention maps too, which
`nn.Transformer` does not hand out. Loss and gradients in float32 without dropout are compared first. The peak memory is that of a process of its own: what
three steps add to a loaded model, gradients and the optimiser's moments included.

Other mixers stand beside attention, in models of the same widths: "MA" is Mamba and attention by turns, on both sides (`LETTERS` of cvmk/config/model.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import cpu_limit
from plain_transformer import PlainTransformer, drawn_batch, pairs, plain
from torch import Tensor
from torch.nn import functional as F

from cvmk.config import DistillationConfig, OptimizerConfig
from cvmk.config.schema import ModelConfig
from cvmk.distill import DistillationObjective
from cvmk.nn import CVMTransformer
from cvmk.text.batching import Batch
from cvmk.training.optimizers import build_optimizer
from cvmk.training.step import TrainingStep
from cvmk.training.work import phase_products
from cvmk.training.world import World

V, SENTENCES, LENGTH, SMOOTHING, ALPHA, RATE = 8000, 120, 17, 0.1, 0.7, 1e-4
SIZES = {
    "d128 4+4": {"d_model": 128, "ffn": 256, "heads": 4, "encoder_layers": 4, "decoder_layers": 4},
    "d256 3+3": {"d_model": 256, "ffn": 512, "heads": 4, "encoder_layers": 3, "decoder_layers": 3},
    "d512 6+6": {"d_model": 512, "ffn": 2048, "heads": 8, "encoder_layers": 6, "decoder_layers": 6},
}
TEACHER = ModelConfig(**SIZES["d256 3+3"], dropout=0.0)


@dataclass(frozen=True)
class Case:
    size: str
    dropout: float = 0.1
    lowered: bool = True
    teacher: str = ""
    """What is learnt from a teacher: nothing, "teacher" (logits) or "all of the teacher"."""
    mixers: str = "A"

    def __str__(self) -> str:
        named = self.mixers if self.mixers != "A" else ""
        return " ".join(filter(None, [f"training step {self.size} dropout {self.dropout:g} {'bf16' if self.lowered else 'fp32'}", self.teacher, named]))

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**SIZES[self.size], dropout=self.dropout, encoder_mixers=self.mixers, decoder_mixers=self.mixers)


def models(case: Case) -> tuple[CVMTransformer, CVMTransformer | None]:
    """The student and, where there is one, its teacher."""
    torch.manual_seed(0)
    student = CVMTransformer(case.config, V)
    return student, CVMTransformer(TEACHER, V).eval().requires_grad_(False) if case.teacher else None


def objective_of(case: Case) -> DistillationObjective:
    weights = {"beta": 0.1, "gamma": 0.1} if case.teacher == "all of the teacher" else {}
    config = DistillationConfig(alpha=ALPHA, **weights) if case.teacher else DistillationConfig(alpha=0.0)
    return DistillationObjective(
        config, label_smoothing=SMOOTHING, student=case.config, teacher=TEACHER if case.teacher else None, vocab_size=V
    )


def own_step(case: Case, batch: Batch) -> Callable[[], Any]:
    student, teacher = models(case)
    objective = objective_of(case)
    optimizer = build_optimizer(OptimizerConfig(learning_rate=RATE), (student, objective))
    step = TrainingStep(
        student, teacher, objective, optimizer, precision="bfloat16" if case.lowered else "float32", clip_norm=1.0, world=World()
    )
    return lambda: step([batch], 1.0)


def peer_loss(student: PlainTransformer, teacher: PlainTransformer | None, batch: Batch) -> Tensor:
    """As `DistillationObjective` without hidden states and maps."""
    logits, real = student(batch.src, batch.tgt_in).flatten(0, 1), batch.tgt_out.flatten()
    loss = F.cross_entropy(logits, real, ignore_index=0, label_smoothing=SMOOTHING)
    if teacher is None:
        return loss
    with torch.no_grad():
        taught = F.log_softmax(teacher(batch.src, batch.tgt_in).flatten(0, 1), -1)
    rows = F.kl_div(F.log_softmax(logits, -1), taught, log_target=True, reduction="none").sum(-1)
    return (1 - ALPHA) * loss + ALPHA * rows.masked_fill(real == 0, 0.0).sum() / batch.tokens


def peer_step(case: Case, batch: Batch, compiled: bool) -> Callable[[], Any]:
    ours, its_teacher = models(case)
    student, teacher = plain(ours), plain(its_teacher) if its_teacher is not None else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, betas=(0.9, 0.98), eps=1e-9, fused=True)

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.lowered):
            return peer_loss(student, teacher, batch)

    forward = torch.compile(losses) if compiled else losses

    def step() -> None:
        forward().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


CONTESTANTS: dict[str, Callable[[Case, Batch], Callable[[], Any]]] = {
    "cvmk": own_step,
    "nn.Transformer": lambda case, batch: peer_step(case, batch, False),
    "compiled": lambda case, batch: peer_step(case, batch, True),
}


# -- the same results ---------------------------------------------------------------------------------------------------------------------
def check_results(case: Case, batch: Batch) -> None:
    """Loss and gradients of cvmk are those of the peer."""
    ours, its_teacher = models(case)
    student, teacher = plain(ours.train()), plain(its_teacher) if its_teacher is not None else None
    expected = peer_loss(student, teacher, batch)
    expected.backward()
    step = TrainingStep(ours, its_teacher, objective_of(case), _Keep(ours), precision="float32", clip_norm=0.0, world=World())  # type: ignore[arg-type]
    loss = step([batch], 1.0).loss
    torch.testing.assert_close(torch.tensor(loss), expected.detach(), rtol=1e-5, atol=0)
    for mine, theirs in pairs(ours, student):
        assert theirs.grad is not None
        # A unit of the feed-forward layers as near to zero as rounding passes a gradient in one library and none in the other: up to 1.2e-3 for one of them
        # at d 128; without any, 1e-5.
        apart = torch.cat([parameter.grad for parameter in mine]) - theirs.grad  # type: ignore[misc]
        assert apart.norm() <= 5e-3 * theirs.grad.norm(), f"gradients of shape {tuple(apart.shape)} differ by {apart.norm() / theirs.grad.norm():.1e}"


class _Keep:
    """An optimiser that changes nothing and leaves the gradients where they are."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = list(model.parameters())

    def clip(self, norm: float) -> Tensor:
        return torch.zeros(())

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


# -- memory -------------------------------------------------------------------------------------------------------------------------------
def peak_memory(case: Case, name: str) -> float:
    """MB that three steps add to a process that holds the model and has taken a step of another, small one."""
    arguments = json.dumps([case.size, case.dropout, case.lowered, case.teacher, name])
    command = [sys.executable, __file__, arguments]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    return float(done.stdout.split()[-1])


def _status(field: str) -> int:
    """Bytes that /proc tells of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _measure(size: str, dropout: float, lowered: bool, teacher: str, name: str) -> float:
    case = Case(size, dropout, lowered, teacher)
    small = drawn_batch(2, 5, V)
    CONTESTANTS[name](Case("d128 4+4", dropout, lowered, teacher), small)()
    batch = drawn_batch(SENTENCES, LENGTH, V)
    step = CONTESTANTS[name](case, batch)
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1e6


# -- rows ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("teacher", ["", "teacher", "all of the teacher"], ids=["alone", "teacher", "all"])
@pytest.mark.parametrize("lowered", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dropout", [0.1, 0.0], ids=["dropout", "exact"])
@pytest.mark.parametrize("size", SIZES, ids=[size.split()[0] for size in SIZES])
def test_cpu_training_step(compare: Callable[..., Any], size: str, dropout: float, lowered: bool, teacher: str) -> None:
    case, batch = Case(size, dropout, lowered, teacher), drawn_batch(SENTENCES, LENGTH, V)
    comparable = teacher != "all of the teacher"
    if comparable:
        check_results(Case(size, 0.0, False, teacher), batch)
    torch._dynamo.reset()
    peers = {name: make(case, batch) for name, make in CONTESTANTS.items() if name != "cvmk"} if comparable else {}
    operations = sum(phase_products(case.config, TEACHER if case.teacher else None, V, [batch]).values())
    limit = cpu_limit(operations=operations, dtype=torch.bfloat16 if lowered else torch.float32)
    compare(own_step(case, batch), peers, case=str(case), limit=limit)


@pytest.mark.parametrize("mixers", ["M", "MMMA", "MA", "S", "2", "R", "W", "H"])
def test_cpu_training_of_mixers(compare: Callable[..., Any], mixers: str) -> None:
    batch = drawn_batch(SENTENCES, LENGTH, V)
    compare(own_step(Case("d128 4+4", mixers=mixers), batch), {"attention": own_step(Case("d128 4+4"), batch)}, case=str(Case("d128 4+4", mixers=mixers)))


@pytest.mark.parametrize("lowered", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("size", SIZES, ids=[size.split()[0] for size in SIZES])
def test_cpu_training_memory(record_row: Callable[[dict[str, Any]], None], size: str, lowered: bool) -> None:
    case = Case(size, lowered=lowered)
    megabytes = {name: peak_memory(case, name) for name in CONTESTANTS}
    record_row({"case": f"memory of a {case}", "megabytes": megabytes})


if __name__ == "__main__":
    print(_measure(*json.loads(sys.argv[1])))
