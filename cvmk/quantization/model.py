"""A CVMTransformer and a recipe to a quantised CVMTransformer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cvmk.errors import ConfigError
from cvmk.formats.quantized_weights import quantized_layers, replace_layer
from cvmk.nn import CVMTransformer
from cvmk.ops import QuantizedWeight
from cvmk.ops.quantize import rounded_rows
from cvmk.quantization import awq, smoothquant
from cvmk.quantization.calibration import InputStatistics, Pair, collect, padded
from cvmk.quantization.gptq import gptq
from cvmk.quantization.recipe import Recipe
from cvmk.quantization.rounding import Grid
from cvmk.quantization.sites import Site, apply, check_group, folds, matrix, sites
from cvmk.quantization.static_range import input_range

Say = Callable[[str], None]


@dataclass(frozen=True)
class LayerReport:
    """What became of a matrix: how it is stored, the bytes of its tensors, and the signal-to-noise ratios in dB (larger is better) of its outputs on
    calibration inputs, as it is and as rounding to nearest would have made it; of its rows, where only these are looked up."""

    name: str
    stored: str
    bytes: int
    snr: float
    nearest_snr: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """A matrix's quantised weights: as the recipe has it, and the next higher precision, None for floats.

    `activations` is how its inputs are rounded, `smooth` [K] or None what they are divided by before that, `range` [1] or None the magnitude by which, as
    `QuantizedLinear` has them.
    """

    site: Site
    weight: QuantizedWeight
    activations: str
    smooth: Tensor | None
    range: Tensor | None
    raised: QuantizedWeight | None
    snr: float
    nearest_snr: float


class Quantized:
    """Everything that a recipe makes of a model, so that single matrices can be raised to a higher precision without doing the rest again.

    `model` is the source with scales folded in, in floats; it computes what the source does (after `recovered` with other norms and biases).
    """

    def __init__(self, model: CVMTransformer, choices: Sequence[Choice]) -> None:
        self.model = model
        self._choices = {choice.site.name: choice for choice in choices}

    @property
    def choices(self) -> Mapping[str, Choice]:
        """What becomes of each matrix, by its name."""
        return self._choices

    def recovered(self, weights: Mapping[str, QuantizedWeight], others: Mapping[str, Tensor], pairs: Sequence[Pair]) -> Quantized:
        """With other quantised weights, by their matrices' names, and other values of parameters that are no such matrix. What raised matrices become stays;
        the ratios are measured again, by the inputs that the source has on these pairs."""
        model = copy.deepcopy(self.model)
        model.load_state_dict({**model.state_dict(), **others})
        statistics = collect(self.model, [choice.site for choice in self._choices.values()], pairs)

        def changed(choice: Choice) -> Choice:
            name, weight = choice.site.name, weights[choice.site.name]
            snr = signal_to_noise(matrix(self.model, name), weight, statistics.get(name), choice.activations, choice.smooth, choice.range)
            return replace(choice, weight=weight, snr=snr)

        return Quantized(model, [changed(choice) for choice in self._choices.values()])

    @property
    def names(self) -> list[str]:
        """The matrices that are quantised."""
        return list(self._choices)

    def build(self, raised: Collection[str] = ()) -> CVMTransformer:
        """The quantised model; the matrices in `raised` in 8 bits where the others have 4, else in floats."""
        model = copy.deepcopy(self.model)
        for name in self._choices:
            self._place(model, name, name in raised)
        return model.eval()

    def build_only(self, name: str) -> CVMTransformer:
        """The model with this matrix quantised and all others in floats."""
        model = copy.deepcopy(self.model)
        self._place(model, name, False)
        return model.eval()

    def layers(self, model: CVMTransformer) -> list[LayerReport]:
        """What became of each matrix in a model that `build` made."""
        found = quantized_layers(model)
        reports = []
        for name, choice in self._choices.items():
            layer = found.get(name)
            whole = math.prod(choice.weight.shape)
            as_chosen = layer is not None and layer.bits == choice.weight.bits
            stored = "float" if layer is None else f"int{layer.bits}"
            size = 4 * whole if layer is None else sum(tensor.nbytes for tensor in layer.weight.tensors().values())
            snr = choice.snr if as_chosen else math.inf if layer is None else math.nan
            reports.append(LayerReport(name, stored, size, snr, choice.nearest_snr))
        return reports

    def _place(self, model: CVMTransformer, name: str, raised: bool) -> None:
        choice = self._choices[name]
        if not raised:
            replace_layer(model, name, choice.weight, smooth_scale=choice.smooth, activations=choice.activations, input_range=choice.range)
        elif choice.raised is not None:
            replace_layer(model, name, choice.raised, activations="token")


def chosen_sites(model: CVMTransformer, recipe: Recipe) -> list[Site]:
    """The matrices that a recipe quantises. Raises ConfigError where groups do not fit one, and where nothing is left."""
    keep = set(recipe.keep)
    tied = model.embeddings.output is None
    found = [site for site in sites(model) if site.kind not in keep and not (site.kind == "embeddings" and tied and "output" in keep)]
    if not found:
        raise ConfigError("nothing is left to quantise: keep less")
    wrong = check_group(found, model, recipe.group) if recipe.bits == 4 else None
    if wrong:
        raise ConfigError(f"{wrong}: choose another group size (32, 64 or 128), or w8a8")
    return found


def quantize_model(model: CVMTransformer, recipe: Recipe, pairs: Sequence[Pair], say: Say = lambda text: None) -> Quantized:
    """Quantise a model by a recipe, calibrated on pairs (see `calibration.read_pairs`). The model stays as it is.

    Raises ConfigError for a model that is quantised already, for groups that do not fit, and where nothing is left to quantise.
    """
    if quantized_layers(model):
        raise ConfigError("the model is quantised already: quantise the model that it was made of")
    work = copy.deepcopy(model).cpu().float().eval()
    chosen = chosen_sites(work, recipe)
    say(f"calibrating {len(chosen)} matrices on {len(pairs)} sentences")
    statistics = collect(work, chosen, pairs)
    nearest = {}
    for site in chosen:
        weight = matrix(work, site.name)
        rounded = recipe.grid(weight.shape[1]).nearest(weight)
        span = _range(recipe, weight, rounded, statistics.get(site.name))
        nearest[site.name] = signal_to_noise(weight, rounded, statistics.get(site.name), recipe.activations, None, span)
    smooth: dict[str, Tensor] = {}
    if recipe.method in ("smoothquant", "awq"):
        say(f"searching scales ({recipe.method})")
        smooth = _fold_scales(work, recipe, chosen, statistics)
    choices = [_choose(work, recipe, site, statistics.get(site.name), smooth.get(site.name), nearest[site.name]) for site in chosen]
    if recipe.kv_cache != "float":  # else as the model has been trained
        work.keep_caches(recipe.kv_cache)
    return Quantized(work, choices)


def _fold_scales(work: CVMTransformer, recipe: Recipe, chosen: Sequence[Site], statistics: dict[str, InputStatistics]) -> dict[str, Tensor]:
    """Search scales, put them into the layers before, and bring the statistics up to date; the scales that no layer takes, by matrix."""
    names = {site.name for site in chosen}
    placed: set[str] = set()
    for fold in folds(work):
        if not names.issuperset(fold.readers):  # a reader in floats would be scaled as well; that is exact, but of no use
            continue
        placed.update(fold.readers)
        weights, inputs = [matrix(work, name) for name in fold.readers], [statistics[name] for name in fold.readers]
        channels, grid = torch.tensor(fold.channels), recipe.grid(weights[0].shape[1])
        if recipe.method == "awq":
            scale = awq.search_scale(weights, inputs, channels, grid)
        else:
            scale = smoothquant.search_scale(weights, inputs, channels, grid, recipe.static)[0]
        if scale is not None:
            apply(work, fold, scale)
            for name in fold.readers:
                statistics[name] = statistics[name].divided(scale[channels])
    found = {}
    if recipe.method == "smoothquant" and recipe.bits == 8:
        for site in chosen:
            if site.module is None or site.looked_up or site.name in placed:
                continue
            weight = matrix(work, site.name)
            scale, _ = smoothquant.search_scale([weight], [statistics[site.name]], torch.arange(weight.shape[1]), recipe.grid(weight.shape[1]), recipe.static)
            if scale is not None:
                found[site.name] = scale.float()
    return found


def _choose(work: CVMTransformer, recipe: Recipe, site: Site, inputs: InputStatistics | None, smooth: Tensor | None, nearest: float) -> Choice:
    weight = matrix(work, site.name)
    grid = recipe.grid(weight.shape[1])
    scaled = weight if smooth is None else weight * smooth
    moment = _moment(site, inputs, weight)
    if recipe.method == "gptq":
        found = gptq(scaled, moment, grid, damping=recipe.damping, act_order=recipe.act_order, static_groups=recipe.static_groups)
    elif recipe.method == "awq":
        found = awq.clipped(scaled, moment, grid)
    else:
        found = grid.nearest(scaled)
    raised = Grid(8, weight.shape[1]).nearest(weight) if recipe.bits == 4 else None
    span = _range(recipe, scaled, found, inputs if inputs is None or smooth is None else inputs.divided(smooth))
    snr = signal_to_noise(weight, found, inputs, recipe.activations, smooth, span)
    return Choice(site, found, "token" if recipe.static and span is None else recipe.activations, smooth, span, raised, snr, nearest)


def _range(recipe: Recipe, weight: Tensor, found: QuantizedWeight, inputs: InputStatistics | None) -> Tensor | None:
    """The static magnitude of a matrix's inputs; None where each token has its own, and where rows are only looked up."""
    return input_range(weight, found.dequantize(), inputs) if recipe.static and inputs is not None else None


def _moment(site: Site, inputs: InputStatistics | None, weight: Tensor) -> Tensor:
    """What errors of a matrix's rows cost. Rows that are looked up count as they are; where the matrix is the output layer as well, both in equal parts."""
    identity = torch.eye(weight.shape[1], dtype=torch.float64)
    if inputs is None:
        return identity
    return inputs.moment + identity * inputs.moment.diagonal().mean() if site.looked_up else inputs.moment


@torch.no_grad()
def signal_to_noise(
    weight: Tensor,
    quantized: QuantizedWeight,
    inputs: InputStatistics | None,
    activations: str = "float",
    smooth: Tensor | None = None,
    span: Tensor | None = None,
) -> float:
    """10 log10 of E |x W^T|^2 / E |x W^T - x' Q^T|^2, x' the inputs as they are rounded (`span`: by that magnitude); without inputs that of the
    matrices."""
    rounded = quantized.dequantize(torch.float64)
    if inputs is None:
        return _decibel(weight.double(), rounded)
    x = inputs.rows if smooth is None else inputs.rows / smooth
    seen = x if activations == "float" else rounded_rows(x, span)
    return _decibel(inputs.rows.double() @ weight.double().T, seen.double() @ rounded.T)


def _decibel(signal: Tensor, found: Tensor) -> float:
    noise = float((signal - found).square().mean())
    return math.inf if noise == 0 else 10 * math.log10(max(float(signal.square().mean()), 1e-300) / noise)


@torch.no_grad()
def sensitivities(quantized: Quantized, pairs: Sequence[Pair], limit: int = 32) -> dict[str, float]:
    """What each matrix costs by itself: the mean divergence KL(float || that one quantised) of the next piece, in nats, on a few calibration pairs."""
    batches = padded(pairs[:limit], quantized.model.pad_id)
    expected = [_log_probabilities(quantized.model, *batch) for batch in batches]
    found = {}
    for name in quantized.names:
        model = quantized.build_only(name)
        losses = [F.kl_div(_log_probabilities(model, *batch), want, log_target=True, reduction="sum") for batch, want in zip(batches, expected, strict=True)]
        found[name] = float(torch.stack(losses).sum()) / sum(len(want) for want in expected)
    return found


def _log_probabilities(model: CVMTransformer, source: Tensor, target: Tensor) -> Tensor:
    """[tokens, V] of the positions that are no padding."""
    logits: Tensor = model(source, target)[0]
    return logits[target != model.pad_id].float().log_softmax(-1)

