"""The objective against a naive, dense computation in loops over sentences and layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cvmk import ops
from cvmk.config.schema import DistillationConfig, ModelConfig
from cvmk.distill import DistillationObjective, representations
from cvmk.distill import objective as module
from cvmk.distill.representations import Projection, hidden_distance
from cvmk.errors import ConfigError
from cvmk.nn import CVMTransformer
from cvmk.text.batching import Batch

VOCABULARY = 17


def model_config(width: int, heads: int, encoder: int, decoder: int) -> ModelConfig:
    return ModelConfig(d_model=width, ffn=16, heads=heads, encoder_layers=encoder, decoder_layers=decoder, dropout=0.0)


STUDENT, TEACHER, TWIN = model_config(8, 2, 2, 1), model_config(24, 4, 4, 2), model_config(8, 4, 2, 1)


def make_batch(pairs: list[tuple[int, int]], pad: int = 0) -> Batch:
    """Random ids; sentence i has pairs[i] = (source length, target length); `pad` more columns than the longest needs."""
    generator = torch.Generator().manual_seed(3)
    sources, targets = max(s for s, _ in pairs) + pad, max(t for _, t in pairs) + pad
    src, tgt_in, tgt_out = (torch.zeros(len(pairs), n, dtype=torch.int64) for n in (sources, targets, targets))
    for i, (s, t) in enumerate(pairs):
        src[i, :s] = torch.randint(4, VOCABULARY, (s,), generator=generator)
        tgt_in[i, :t] = torch.randint(4, VOCABULARY, (t,), generator=generator)
        tgt_out[i, :t] = torch.randint(4, VOCABULARY, (t,), generator=generator)
    lengths = [torch.tensor([p[side] for p in pairs]) for side in (0, 1)]
    return Batch(src, tgt_in, tgt_out, *lengths, torch.arange(len(pairs)), sum(t for _, t in pairs))


PAIRS = [(5, 3), (2, 4), (4, 1)]


def models(teacher: ModelConfig = TEACHER) -> tuple[CVMTransformer, CVMTransformer]:
    torch.manual_seed(5)
    return CVMTransformer(STUDENT, VOCABULARY).double(), CVMTransformer(teacher, VOCABULARY).double()


def outputs(student: CVMTransformer, teacher: CVMTransformer, batch: Batch) -> tuple[Any, Any]:
    ours = student(batch.src, batch.tgt_in, return_hidden=True, return_attention=True)
    with torch.no_grad():
        return ours, teacher(batch.src, batch.tgt_in, return_hidden=True, return_attention=True)


def objective(teacher: ModelConfig | None = TEACHER, smoothing: float = 0.1, **options: Any) -> DistillationObjective:
    torch.manual_seed(6)
    config = DistillationConfig(**options)
    return DistillationObjective(config, label_smoothing=smoothing, student=STUDENT, teacher=teacher, vocab_size=VOCABULARY).double()


def naive_logits(ours: Tensor, theirs: Tensor, batch: Batch, temperature: float) -> float:
    total = 0.0
    for i, length in enumerate(batch.tgt_lengths.tolist()):
        for j in range(length):
            p, q = F.softmax(theirs[i, j] / temperature, -1), F.softmax(ours[i, j] / temperature, -1)
            total += temperature**2 * (p * (p / q).log()).sum().item()
    return total / batch.tokens


def naive_hidden(ours: Any, theirs: Any, batch: Batch, made: DistillationObjective) -> float:
    """Uniform map of 2 over 4 encoder layers and 1 over 2 decoder layers."""
    found = []
    for stack, s, t, lengths in (("encoder", 0, 1, batch.src_lengths), ("encoder", 1, 3, batch.src_lengths), ("decoder", 0, 1, batch.tgt_lengths)):
        errors = []
        for i, length in enumerate(lengths.tolist()):
            for j in range(length):
                a, b = getattr(ours, stack)[s][i, j], getattr(theirs, stack)[t][i, j]
                projection = made.projections[f"{stack}_{s}_{t}"]
                a = projection.weight @ a + projection.bias
                a, b = ((x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() for x in (a, b))
                errors.append((a - b).square().mean().item())
        found.append(sum(errors) / len(errors))
    return sum(found) / len(found)


def naive_attention(ours: Any, theirs: Any, batch: Batch) -> float:
    """2 student heads, 4 teacher heads: student head h imitates the mean of teacher heads 2h and 2h + 1."""
    found = []
    for kind, s, t in (("encoder", 0, 1), ("encoder", 1, 3), ("decoder", 0, 1), ("cross", 0, 1)):
        p, q = getattr(theirs, kind)[t].probabilities(), getattr(ours, kind)[s].probabilities()
        rows = []
        for i, length in enumerate((batch.src_lengths if kind == "encoder" else batch.tgt_lengths).tolist()):
            for h in range(2):
                for j in range(length):
                    a, b = (p[i, 2 * h, j] + p[i, 2 * h + 1, j]) / 2, q[i, h, j]
                    seen = a > 0
                    rows.append((a[seen] * (a[seen] / b[seen]).log()).sum().item())
        found.append(sum(rows) / len(rows))
    return sum(found) / len(found)


def test_every_part_is_that_of_the_loops() -> None:
    batch = make_batch(PAIRS, pad=1)
    ours, theirs = outputs(*models(), batch)
    made = objective(alpha=0.3, beta=0.7, gamma=0.2, temperature=2.0)
    losses = made(ours, theirs, batch)
    ce = F.cross_entropy(ours[0].flatten(0, 1), batch.tgt_out.flatten(), ignore_index=0, label_smoothing=0.1).item()
    expected = {
        "cross_entropy": ce,
        "logits": naive_logits(ours[0], theirs[0], batch, 2.0),
        "hidden": naive_hidden(ours[1], theirs[1], batch, made),
        "attention": naive_attention(ours[2], theirs[2], batch),
    }
    total = 0.7 * ce + 0.3 * expected["logits"] + 0.7 * expected["hidden"] + 0.2 * expected["attention"]
    assert {name: part.item() for name, part in losses.parts.items()} == pytest.approx({**expected, "loss": total}, rel=1e-6)
    assert min(expected.values()) > 1e-5
    assert losses.total.item() == pytest.approx(total, rel=1e-6) and losses.total.requires_grad
    assert not any(part.requires_grad or part.dim() for part in losses.parts.values())


def test_gradients_reach_student_and_projections_and_not_the_teacher() -> None:
    batch = make_batch(PAIRS)
    student, teacher = models()
    made = objective(beta=1.0, gamma=1.0)
    ours = student(batch.src, batch.tgt_in, return_hidden=True, return_attention=True)
    theirs = teacher(batch.src, batch.tgt_in, return_hidden=True, return_attention=True)
    made(ours, theirs, batch).total.backward()
    assert len(list(made.parameters())) == 6
    for parameter in [*made.parameters(), *student.parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    assert all(parameter.grad.any() for name, parameter in made.named_parameters() if name.endswith("weight"))
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("part", ["hidden", "attention"])
def test_each_representation_reaches_the_first_layer(part: str) -> None:
    batch = make_batch(PAIRS)
    student, teacher = models()
    ours, theirs = outputs(student, teacher, batch)
    options = {"beta": 1.0} if part == "hidden" else {"gamma": 1.0}
    losses = objective(alpha=0.0, **options)(ours, theirs, batch)
    rest = losses.total - objective(alpha=0.0)(ours, theirs, batch).total
    (grad,) = torch.autograd.grad(rest, [next(student.encoder.parameters())])
    assert grad.any() and grad.isfinite().all()


def test_padding_changes_nothing() -> None:
    """More padding columns, and rubbish in the states of padding, leave loss and gradients as they are."""
    made = objective(beta=0.5, gamma=0.5)
    results = []
    for pad, rubbish in ((0, None), (3, None), (3, float("nan"))):
        batch = make_batch(PAIRS, pad=pad)
        student, teacher = models()
        ours, theirs = outputs(student, teacher, batch)
        leaves = []
        for output in (ours, theirs):
            for stack, lengths in (("encoder", batch.src_lengths), ("decoder", batch.tgt_lengths)):
                for i, state in enumerate(getattr(output[1], stack)):
                    padding = torch.arange(state.shape[1]) >= lengths[:, None]
                    state = state.detach() if rubbish is None else state.detach().masked_fill(padding[..., None], rubbish)
                    getattr(output[1], stack)[i] = state.requires_grad_(output is ours)
                    leaves += [state] if output is ours else []
        losses = made(ours, theirs, batch)
        grads = torch.autograd.grad(losses.total, [*leaves, *made.parameters()])
        kept = [g[:, : n.max()] for g, n in zip(grads, [batch.src_lengths] * 2 + [batch.tgt_lengths], strict=False)] + list(grads[3:])
        results.append((losses.total.detach(), kept))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-14)


def test_equal_widths_need_no_projection_and_a_copy_costs_nothing() -> None:
    batch = make_batch(PAIRS)
    made = objective(teacher=TWIN, alpha=0.0, beta=1.0)
    assert not list(made.parameters())
    ours, _ = outputs(*models(TWIN), batch)
    assert made(ours, ours, batch).parts["hidden"].item() == 0
    scaled = (ours[0], type(ours[1])(*[[3 * x for x in layers] for layers in (ours[1].encoder, ours[1].decoder)]), None)
    assert made(ours, scaled, batch).parts["hidden"].item() == pytest.approx(0, abs=1e-6)


def test_hidden_distance_is_bounded() -> None:
    x = torch.randn(2, 3, 32) * 1e6
    real = torch.ones(2, 3, dtype=torch.bool)
    assert hidden_distance(x, -x, real, torch.nn.Identity()).item() == pytest.approx(4, rel=1e-4)
    assert hidden_distance(x, torch.randn(2, 3, 32) * 1e-2, real, torch.nn.Identity()).item() < 4
    assert hidden_distance(x, x, ~real, torch.nn.Identity()).item() == 0


def test_projection_begins_orthogonal() -> None:
    for small, large in ((8, 16), (16, 8)):
        weight = Projection(small, large).weight.detach()
        gram = weight.T @ weight if small < large else weight @ weight.T
        torch.testing.assert_close(gram, torch.eye(8), atol=1e-5, rtol=0)


def test_autocast_does_not_reach_the_hidden_loss() -> None:
    x, y, real = torch.randn(2, 3, 8), torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool)
    projection = Projection(8, 16)
    expected = hidden_distance(x, y, real, projection)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hidden_distance(x, y, real, projection), expected)


def test_weight_zero_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("computed")

    monkeypatch.setattr(module, "hidden_distance", refuse)
    monkeypatch.setattr(module, "attention_distance", refuse)
    batch = make_batch(PAIRS)
    student, teacher = models()
    made = objective(alpha=0.5)
    assert made.needs_teacher and not made.needs_hidden and not made.needs_attention
    with torch.no_grad():
        losses = made(student(batch.src, batch.tgt_in), teacher(batch.src, batch.tgt_in), batch)
    assert losses.parts["hidden"] == 0 and losses.parts["attention"] == 0 and losses.parts["logits"] > 0
    plain = objective(alpha=0.0)
    assert not plain.needs_teacher
    assert plain(student(batch.src, batch.tgt_in), None, batch).parts["logits"] == 0


def test_without_a_teacher_cross_entropy_is_left() -> None:
    batch = make_batch(PAIRS)
    student, _ = models()
    made = objective(teacher=None, alpha=0.9, beta=1.0, gamma=1.0)
    assert not (made.needs_teacher or made.needs_hidden or made.needs_attention or list(made.parameters()))
    losses = made(student(batch.src, batch.tgt_in), None, batch)
    logits = student(batch.src, batch.tgt_in)[0]
    expected = F.cross_entropy(logits.flatten(0, 1), batch.tgt_out.flatten(), ignore_index=0, label_smoothing=0.1)
    torch.testing.assert_close(losses.total, expected)


def test_accumulated_batches_add_up() -> None:
    """Two batches over the tokens of both: logits and cross-entropy are those of the joint batch, the others are weighted means."""
    student, teacher = models()
    made = objective(beta=0.5, gamma=0.5)
    small = [make_batch(PAIRS[:2]), make_batch(PAIRS[2:])]
    tokens = sum(batch.tokens for batch in small)
    pieces = [made(*outputs(student, teacher, batch), batch, normalizer=tokens) for batch in small]
    alone = [made(*outputs(student, teacher, batch), batch) for batch in small]
    for name in alone[0].parts:
        mean = sum(losses.parts[name] * batch.tokens for losses, batch in zip(alone, small, strict=True)) / tokens
        torch.testing.assert_close(sum(losses.parts[name] for losses in pieces), mean)


@pytest.mark.parametrize(
    ("position", "words"), [(1, "hidden states: call the model with return_hidden"), (2, "attention maps: call the model with return_attention")]
)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_missing_outputs(position: int, words: str, who: str) -> None:
    batch = make_batch(PAIRS)
    found = list(outputs(*models(), batch))
    index = 0 if who == "student" else 1
    found[index] = tuple(None if i == position else x for i, x in enumerate(found[index]))
    with pytest.raises(ValueError, match=f"{who}'s {words}"):
        objective(beta=1.0, gamma=1.0)(*found, batch)


def test_other_errors() -> None:
    batch = make_batch(PAIRS)
    ours, theirs = outputs(*models(), batch)
    with pytest.raises(ValueError, match="needs the teacher's output"):
        objective()(ours, None, batch)
    with pytest.raises(ValueError, match=f"16 entries, but the vocabulary has {VOCABULARY}"):
        objective()((ours[0][..., :16], None, None), theirs, batch)
    with pytest.raises(ConfigError, match=r"distillation\.mixture"):
        objective(mixture=0.3)
    assert math.isfinite(objective(mixture=0.3, divergence="js")(ours, theirs, batch).total.item())
    with pytest.raises(ConfigError, match=r"distillation\.layer_map"):
        objective(beta=1.0, layer_map=[(1, 1)])


def unprojected(student: CVMTransformer, teacher: CVMTransformer, batch: Batch, made: DistillationObjective) -> tuple[Any, Any]:
    """As the training step runs the two models."""
    with torch.no_grad():
        theirs = teacher.forward_unprojected(batch.src, batch.tgt_in, return_hidden=True, return_attention=True)
    imitated = made.imitated(theirs)
    return student.forward_unprojected(batch.src, batch.tgt_in, return_hidden=True, return_attention=True, imitated=imitated), theirs


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}, {"attention_dropout": 0.0, "norm": "rmsnorm", "kv_heads": 1}], ids=str)
@pytest.mark.parametrize("layers", ["uniform", [(0, 1), (0, 0)]], ids=["one to one", "one to two"])
def test_without_logits_and_with_fused_maps_losses_and_gradients_are_the_same(options: dict[str, Any], layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(PAIRS, pad=1)
    torch.manual_seed(5)
    student, teacher = CVMTransformer(STUDENT.model_copy(update=options), VOCABULARY).double(), CVMTransformer(TEACHER, VOCABULARY).double()
    made = objective(alpha=0.3, beta=0.7, gamma=0.2, temperature=2.0, layer_map=layers)
    parameters = [*student.parameters(), *made.parameters()]
    results, compared = [], []
    monkeypatch.setattr(representations.ops, "attention_kl", lambda *a, real=ops.attention_kl, **o: compared.append(1) or real(*a, **o))
    for run in (lambda: outputs(student, teacher, batch), lambda: unprojected(student, teacher, batch, made)):
        compared.clear()
        losses = made(*run(), batch)
        results.append((losses.parts, torch.autograd.grad(losses.total, parameters)))
    (parts, grads), (same_parts, same_grads) = results
    assert len(compared) == (0 if layers == "uniform" else 6)
    for name, part in parts.items():
        torch.testing.assert_close(same_parts[name], part, rtol=1e-10, atol=1e-12)
    for mine, other in zip(grads, same_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_dropped_attention_weights_are_compared_undropped() -> None:
    """The op that attends and compares does not drop: the maps are then compared by themselves."""
    batch = make_batch(PAIRS)
    student, teacher = CVMTransformer(STUDENT.model_copy(update={"attention_dropout": 0.9}), VOCABULARY).double(), models()[1]
    made = objective(gamma=1.0)
    ours, theirs = unprojected(student.train(), teacher, batch, made)
    assert all(found.divergence is None for kind in ("encoder", "decoder", "cross") for found in getattr(ours[2], kind))
    assert ours[2].encoder[0].q.requires_grad and made(ours, theirs, batch).parts["attention"] > 0
    assert unprojected(student.eval(), teacher, batch, made)[0][2].cross[0].divergence is not None


def test_logits_of_one_side_and_hidden_states_of_the_other_are_one_loss() -> None:
    batch = make_batch(PAIRS)
    student, teacher = models()
    made = objective(alpha=0.6)
    (ours, theirs), (lazy_ours, lazy_theirs) = outputs(student, teacher, batch), unprojected(student, teacher, batch, made)
    expected = made(ours, theirs, batch).total
    for pair in ((lazy_ours, theirs), (ours, lazy_theirs)):
        torch.testing.assert_close(made(*pair, batch).total, expected)
    with pytest.raises(ValueError, match="the student's logits have 5 entries, but the vocabulary has 17"):
        made((lazy_ours[0]._replace(matrix=torch.zeros(5, 8)), None, None), lazy_theirs, batch)


@pytest.mark.exhaustive
def test_losses_compile_as_one_graph() -> None:
    batch = make_batch(PAIRS)
    student, teacher = (model.float() for model in models())
    made = objective(alpha=0.3, beta=0.7, gamma=0.2).float()

    def losses() -> Tensor:
        return made(*unprojected(student, teacher, batch, made), batch).total

    torch.testing.assert_close(torch.compile(losses, backend="aot_eager", fullgraph=True)(), losses())
