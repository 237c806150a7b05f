"""Each method against a slow float64 implementation of its formula, on random layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cvmk import ops
from cvmk.quantization import Grid, InputStatistics, awq, clipped, gptq, smoothquant
from cvmk.quantization.calibration import Half

N, K, G = 6, 64, 32


def layer(seed: int = 0, outputs: int = N) -> Tensor:
    return torch.randn(outputs, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def inputs(seed: int = 1, count: int = 300) -> Tensor:
    """Correlated inputs, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, K, generator=generator) @ (torch.eye(K) + 0.3 * torch.randn(K, K, generator=generator))
    mixed[:, ::9] *= 12
    return mixed


def statistics(x: Tensor) -> InputStatistics:
    """As if every row were a sentence."""
    wide = x.double()
    one, other = (Half(rows.double().abs().amax(0) if len(rows) else torch.zeros(x.shape[1]).double(), rows.float()) for rows in (x[::2], x[1::2]))
    return InputStatistics(len(x), wide.abs().amax(0), wide.abs().mean(0), wide.T @ wide / len(x), x.float(), (one, other))


# -- slow formulas, number by number -----------------------------------------------------------------------------------------------
def slow_fit(numbers: list[float], bits: int, symmetric: bool, shrink: float = 1.0) -> tuple[float, float]:
    """Scale and zero of a group."""
    if bits == 8 or symmetric:
        step = max(abs(w) for w in numbers) * shrink / (127 if bits == 8 else 7.5)
        return float(torch.tensor(step).float()), 0.0 if bits == 8 else 8.0
    low, high = min(0.0, *numbers) * shrink, max(0.0, *numbers) * shrink
    step = float(torch.tensor((high - low) / 15).float())
    return step, float(min(15, max(0, round(-low / step))))


def slow_round(w: float, scale: float, zero: float, bits: int) -> float:
    least, most = (-127, 127) if bits == 8 else (0, 15)
    return (min(most, max(least, round(w / scale) + zero)) - zero) * scale


def slow_nearest(weight: Tensor, grid: Grid) -> Tensor:
    found = torch.empty(weight.shape, dtype=torch.float64)
    for n in range(weight.shape[0]):
        for start in range(0, weight.shape[1], grid.group):
            group = weight[n, start : start + grid.group].double().tolist()
            scale, zero = slow_fit(group, grid.bits, grid.symmetric)
            for k, w in enumerate(group, start):
                found[n, k] = slow_round(w, scale, zero, grid.bits)
    return found


GRIDS = [Grid(8, K), Grid(4, G), Grid(4, G, symmetric=False), Grid(4, K, symmetric=False)]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=["int8", "int4", "int4 with zeros", "int4, one group"])


@each_grid
def test_nearest_is_the_grids_own_rounding(grid: Grid) -> None:
    weight = layer()
    weight[0] = 0.0
    weight[1, :G] = weight[1, :G].abs()
    found, groups = grid.nearest(weight), grid.groups(weight.double())
    scales, zeros = grid.fit(groups)
    own = grid.weight(grid.values(groups, scales, zeros).flatten(1), scales, zeros)
    assert torch.allclose(own.scales, found.scales, rtol=1e-6) and (own.zeros is None) == grid.symmetric
    weight[0] = 1.0
    scales, zeros = grid.fit(grid.groups(weight.double()))
    for one in (grid.nearest(weight), grid.weight(grid.values(grid.groups(weight.double()), scales, zeros).flatten(1), scales, zeros)):
        apart = (one.dequantize(torch.float64) - slow_nearest(weight, grid)).abs()
        assert (apart <= 1e-6).float().mean() > 0.95  # the largest of a group lies in the middle of two values, and quantize_* round in float32
        step = scales.repeat_interleave(grid.group, 1)
        assert bool(((one.dequantize(torch.float64) - weight).abs() <= step * (0.5 + 1e-4)).all())


def slow_gptq(weight: Tensor, moment: Tensor, grid: Grid, order: list[int], damping: float, static: bool) -> Tensor:
    """Optimal Brain Quantisation in a fixed order: after each input the others change by -(w_k - q_k) / [H_F^-1]_kk [H_F^-1]_k:, F those that are left;
    the inverse of what is left is computed anew each time. Inputs in the order given."""
    h = moment.double()[order][:, order].clone()
    work = weight.double()[:, order].clone()
    h += torch.eye(len(h), dtype=torch.float64) * damping * h.diagonal().mean()
    groups = [[weight[n, start : start + grid.group].double().tolist() for start in range(0, K, grid.group)] for n in range(len(weight))]
    fixed = [[slow_fit(group, grid.bits, grid.symmetric) for group in row] for row in groups]
    found, current = torch.empty_like(work), [[(0.0, 0.0)]] * len(work)
    for k in range(K):
        inverse = torch.linalg.inv(h[k:, k:])
        for n in range(len(work)):
            if not static and k % grid.group == 0:
                current[n] = [slow_fit(work[n, k : k + grid.group].tolist(), grid.bits, grid.symmetric)]
            scale, zero = fixed[n][order[k] // grid.group] if static else current[n][0]
            found[n, k] = slow_round(float(work[n, k]), scale, zero, grid.bits)
            work[n, k:] -= (work[n, k] - found[n, k]) / inverse[0, 0] * inverse[0]
    back = torch.empty_like(found)
    back[:, order] = found
    return back


@each_grid
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_gptq(grid: Grid, act_order: bool, static: bool) -> None:
    weight, moment = layer(), statistics(inputs()).moment
    order = sorted(range(K), key=lambda k: -float(moment[k, k])) if act_order else list(range(K))
    found = gptq(weight, moment, grid, act_order=act_order, static_groups=static)
    expected = slow_gptq(weight, moment, grid, order, 0.01, static or grid.bits == 8)
    assert torch.allclose(found.dequantize(torch.float64), expected, atol=1e-9)
    assert (found.order is not None) == (act_order and not static and grid.bits == 4)

    def error(rounded: Tensor) -> float:
        apart = weight.double() - rounded
        return float(((apart @ moment) * apart).sum())

    assert error(found.dequantize(torch.float64)) < 0.85 * error(grid.nearest(weight).dequantize(torch.float64))


def test_gptq_over_blocks_of_inputs() -> None:
    """More inputs than a block of 128 has: what is left over is corrected at a block's end, and groups do not notice."""
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(3, 320, generator=generator), torch.randn(900, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
    moment = x.double().T @ x.double() / len(x)
    for static in (True, False):
        grid = Grid(4, 64)
        found = gptq(weight, moment, grid, act_order=False, static_groups=static).dequantize(torch.float64)
        h, work = moment + torch.eye(320, dtype=torch.float64) * 0.01 * moment.diagonal().mean(), weight.double().clone()
        expected, scales = torch.empty_like(work), grid.fit(grid.groups(work))[0]
        for k in range(320):
            inverse = torch.linalg.inv(h[k:, k:])
            if not static and k % 64 == 0:
                scales[:, k // 64] = grid.fit(work[:, k : k + 64])[0]
            scale = scales[:, k // 64]
            expected[:, k] = (torch.clamp((work[:, k] / scale).round() + 8, 0, 15) - 8) * scale
            work[:, k:] -= ((work[:, k] - expected[:, k]) / inverse[0, 0])[:, None] * inverse[0]
        assert torch.allclose(found, expected, atol=1e-7)


def test_gptq_with_dead_and_dependent_inputs() -> None:
    x = inputs()
    x[:, 3] = 0.0
    x[:, 5] = x[:, 6]
    few = x[:10]
    for rows in (x, few):
        found = gptq(layer(), statistics(rows).moment, Grid(4, G), damping=0.0).dequantize()
        nearest = Grid(4, G).nearest(layer()).dequantize()
        assert torch.isfinite(found).all() and torch.equal(found[:, 3], nearest[:, 3]), "what calibration did not see is rounded to nearest"
    assert torch.equal(gptq(layer(), torch.zeros(K, K), Grid(8, K)).values, Grid(8, K).nearest(layer()).values)
    with pytest.raises(ValueError, match="not finite"):
        gptq(layer(), torch.full((K, K), math.nan), Grid(4, G))


@pytest.mark.parametrize("grid", GRIDS[1:], ids=["int4", "int4 with zeros", "int4, one group"])
@pytest.mark.parametrize("shared", [False, True])
def test_awq_scales(grid: Grid, shared: bool) -> None:
    """Two layers of the same inputs; `shared`: two inputs each have one scale."""
    weights, x = [layer(), layer(4, 3)], inputs()
    channels = torch.arange(K) // 2 if shared else torch.arange(K)
    count = int(channels.max()) + 1

    def error(scale: list[float] | None) -> float:
        total = 0.0
        for weight in weights:
            s = torch.ones(K, dtype=torch.float64) if scale is None else torch.tensor([scale[int(c)] for c in channels], dtype=torch.float64)
            rounded = slow_nearest_double(weight.double() * s, grid)
            total += float((x.double() @ weight.double().T - (x.double() / s) @ rounded.T).square().sum() / len(x))
        return total

    def per_channel(values: list[float]) -> list[float]:
        return [sum(v for k, v in enumerate(values) if int(channels[k]) == c) / (2 if shared else 1) for c in range(count)]

    mean = [max(v, 1e-4) for v in per_channel([float(x[:, k].double().abs().mean()) for k in range(K)])]
    shares = []
    for k in range(K):
        start = k // grid.group * grid.group
        column = [abs(float(w[n, k])) / float(w[n, start : start + grid.group].abs().max()) for w in weights for n in range(len(w))]
        shares.append(sum(column) / len(column))
    size = per_channel(shares)
    best, least = None, error(None)
    for ratio in [index * 0.05 for index in range(1, 20)]:
        for duo in (False, True):
            scale = [m**ratio / (s ** (1 - ratio) + 1e-4 if duo else 1) for m, s in zip(mean, size, strict=True)]
            norm = math.sqrt(max(scale) * min(scale))
            scale = [value / norm for value in scale]
            if (found := error(scale)) < least:
                best, least = scale, found
    found = awq.search_scale(weights, [statistics(x)] * 2, channels, grid)
    assert found is not None and best is not None and torch.allclose(found, torch.tensor(best, dtype=torch.float64), rtol=1e-9)
    assert least < 0.8 * error(None)


def slow_nearest_double(weight: Tensor, grid: Grid) -> Tensor:
    groups = weight.unflatten(1, (-1, grid.group))
    scales, zeros = grid.fit(groups)  # itself held to slow_fit above
    return ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15).sub(zeros[..., None]).mul(scales[..., None]).flatten(1)


@pytest.mark.parametrize("grid", GRIDS[1:3], ids=["int4", "int4 with zeros"])
def test_awq_clipping(grid: Grid) -> None:
    weight, x = layer(7), inputs(3)
    found = clipped(weight, statistics(x).moment, grid).dequantize(torch.float64)
    for n in range(N):
        for start in range(0, K, G):
            group, seen = weight[n, start : start + G].double().tolist(), x[:, start : start + G].double()
            least, best = math.inf, torch.zeros(G)
            for step in range(20):
                scale, zero = slow_fit(group, 4, grid.symmetric, 1 - step / 40)
                rounded = torch.tensor([slow_round(w, scale, zero, 4) for w in group], dtype=torch.float64)
                loss = float((seen @ (torch.tensor(group, dtype=torch.float64) - rounded)).square().mean())
                if loss < least:
                    least, best = loss, rounded
            assert torch.allclose(found[n, start : start + G], best, atol=1e-9)
    moment = statistics(x).moment
    errors = [((weight.double() - one) @ moment * (weight.double() - one)).sum() for one in (found, grid.nearest(weight).dequantize(torch.float64))]
    assert errors[0] < errors[1]


def test_smoothquant_formula() -> None:
    weights, x = [layer(), layer(4, 3)], inputs()
    for alpha in (0.0, 0.35, 1.0):
        expected = []
        for k in range(K):
            w = max(abs(float(weight[n, k])) for weight in weights for n in range(len(weight)))
            expected.append(max(float(x[:, k].abs().max()) ** alpha / w ** (1 - alpha), 1e-5))
        found = smoothquant.scale_of(weights, statistics(x).largest, alpha, torch.arange(K))
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6)
    pairs = torch.arange(K) // 2
    found = smoothquant.scale_of(weights, statistics(x).largest, 1.0, pairs)
    assert torch.allclose(found, x.abs().amax(0).view(-1, 2).amax(1).double())
    x[:, 5], x[:, 7] = 0.0, 0.01  # asleep
    found = smoothquant.scale_of(weights, statistics(x).largest, 1.0, torch.arange(K))
    median = sorted(float(x[:, k].abs().max()) for k in range(K) if k != 5)[(K - 2) // 2]
    assert found[5] == found[7] == pytest.approx(median / 2)
    assert bool((smoothquant.scale_of(weights, torch.zeros(K), 1.0, torch.arange(K)) == 1e-5).all())


def smooth_error(weights: list[Tensor], x: Tensor, scale: Tensor | None) -> float:
    s = torch.ones(K, dtype=torch.float64) if scale is None else scale
    total = 0.0
    for weight in weights:
        w, u = weight.double() * s, x.double() / s
        step = w.abs().amax(1, keepdim=True) / 127
        rows = u.abs().amax(1, keepdim=True) / 127
        seen, rounded = (u / rows).round() * rows, (w / step).round() * step
        total += float((seen @ rounded.T - x.double() @ weight.double().T).square().sum())
    return total


def test_smoothquant_searches_alpha_by_layer() -> None:
    """Each half's scales are tried on the other half; the scale itself is made of both."""
    weights, x = [layer(), layer(4, 3)], inputs()
    scale, alpha = smoothquant.search_scale(weights, [statistics(x)] * 2, torch.arange(K), Grid(8, K))
    halves = ((x[::2], x[1::2]), (x[1::2], x[::2]))

    def scale_of(seen: Tensor, alpha: float) -> Tensor:
        return smoothquant.scale_of(weights, seen.abs().amax(0), alpha, torch.arange(K))

    errors = {index / 20: sum(smooth_error(weights, held, scale_of(seen, index / 20)) for seen, held in halves) for index in range(21)}
    assert scale is not None and alpha is not None and torch.equal(scale, scale_of(x, alpha))
    assert errors[alpha] <= 1.001 * min(errors.values()) and errors[alpha] < 0.5 * smooth_error(weights, x, None)
    flat = torch.ones(50, K)
    assert smoothquant.search_scale([torch.ones(2, K)], [statistics(flat)], torch.arange(K), Grid(8, K)) == (None, None)
    assert smoothquant.search_scale(weights, [statistics(x[:1])] * 2, torch.arange(K), Grid(8, K)) == (None, None), "there is nothing to try a scale on"


@pytest.mark.parametrize("seed", range(3))
def test_smoothquant_is_no_worse_than_rounding_on_text_that_it_did_not_see(seed: int) -> None:
    """Units behind a relu that wake seldom, and a few that calibration never sees awake: the paper's scales that fit the calibration sentences best make
    the rest of the text much worse than no scale."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.rand(K, generator=generator) * 4 + 0.5
    x = torch.randn(4000, K, generator=generator).relu() * loud
    x = x * (torch.rand(4000, K, generator=generator) < torch.where(torch.arange(K) % 3 == 0, 0.01, 0.8))
    weights, seen, unseen = [layer(seed)], x[:100], x[100:]

    largest, own, plain = seen.abs().amax(0).double().clamp(min=1e-5), weights[0].abs().amax(0).double(), smooth_error(weights, unseen, None)
    paper = min((largest**alpha / own ** (1 - alpha) for alpha in smoothquant.ALPHAS), key=lambda scale: smooth_error(weights, seen, scale))
    assert smooth_error(weights, seen, paper) < smooth_error(weights, seen, None) and smooth_error(weights, unseen, paper) > 2 * plain
    scale, _ = smoothquant.search_scale(weights, [statistics(seen)], torch.arange(K), Grid(8, K))
    assert smooth_error(weights, unseen, scale) <= 1.01 * plain


def test_rounded_rows_are_what_int8_linear_sees() -> None:
    x = inputs()[:20].clone()
    x[3] = 0.0
    weight = ops.quantize_int8(layer(0, 16))
    assert torch.allclose(ops.quantize.rounded_rows(x).double() @ weight.dequantize(torch.float64).T, ops.int8_linear(x.double(), weight), rtol=1e-5, atol=1e-4)
    x[4, 0] = math.nan
    assert bool(ops.quantize.rounded_rows(x)[4, 0].isnan()) and torch.isfinite(ops.quantize.rounded_rows(x)[5]).all()
