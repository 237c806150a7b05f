"""A model's folder to the folder of a quantised one, through the gate."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from cvmk import __version__
from cvmk.errors import ConfigError, DataError, QualityGateError
from cvmk.formats import Manifest, load_model_folder, read_model_manifest, save_model_folder
from cvmk.formats.folder import WEIGHTS
from cvmk.formats.manifest import QUANTIZED
from cvmk.inference import Translator
from cvmk.nn import CVMTransformer
from cvmk.quantization.calibration import Pair, check_language, read_pairs
from cvmk.quantization.gate import METRICS, Evaluation, Gate
from cvmk.quantization.model import LayerReport, Quantized, Say, quantize_model, sensitivities
from cvmk.quantization.recipe import Recipe
from cvmk.report.names import QUANTIZATION
from cvmk.telemetry import Event
from cvmk.telemetry.schema import QuantizationEnded, QuantizationStarted, QuantizationTrial, Recovering
from cvmk.text.tokenizers import Tokenizer
from cvmk.validation.tokenization import tokenization

REPORT = QUANTIZATION
_MORE = ("languages",)
"""Keys of config.json that the quantised model takes over."""


Tell = Callable[[Event], None]


class Recover(Protocol):
    """Makes good what rounding cost, by training; `cvmk.training.recovery.Recovery` is one.

    It gets the quantised model, a translator of the model before, the calibration text, the pairs that the model was calibrated on, and whom to tell how
    it goes; it returns what it made, and what the report says of it.
    """

    def __call__(
        self, quantized: Quantized, translator: Translator, calibration: Sequence[str], pairs: Sequence[Pair], say: Say, /
    ) -> tuple[Quantized, dict[str, Any]]: ...


class GateFailure(QualityGateError):
    """The quantised model lost more than it may, even with as many matrices in a higher precision as it may have. `report` is what would have been written."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    calibration: Sequence[str],
    sources: Sequence[str],
    references: Sequence[str],
    calibration_sentences: int = 128,
    max_drop: float | None = 0.3,
    max_raised: int | None = None,
    beam_size: int = 1,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    calibration_name: str = "the calibration text",
    recover: Recover | None = None,
    say: Say = lambda text: None,
    tell: Tell = lambda event: None,
) -> dict[str, Any]:
    """Quantise the model in a folder by a recipe and write the folder `out`, which loads without the original; the original stays as it is.

    calibration            sentences of the source language; `calibration_sentences` of them, evenly spread, are used.
    sources, references    the evaluation set: the model is translated with before and after (with `beam_size`), and compared by a paired bootstrap.
    max_drop               points of BLEU that may be lost. Where more are, the matrices that cost most by themselves are raised one by one (4 bits to 8, 8 bits
                           to floats), at most `max_raised` of them (None: a quarter), until the gate passes. None: no gate.
    recover                trains the quantised model before it comes to the gate.
    say, tell              get how it goes, as sentences and as events.

    Returns the report that stands in the folder as quantization.json: recipe, calibration, evaluation; recovery (None, or what was done, and `unrecovered`,
    the score without it); before, after (scores with intervals, seconds, tokens a second, bytes of the weights); paired differences; layers (how stored,
    bytes, signal-to-noise ratio); raised; trials; gate; the sentences that changed most.

    Raises GateFailure where that is not enough (nothing is written then); ConfigError for a model that is quantised already, a recipe that does not fit it and
    an `out` that is the model; DataError for texts that are empty, unequal or of another language, and for a model that is not sound.
    """
    folder, manifest, _ = read_model_manifest(model)
    _check(folder, Path(out), manifest, sources, references)
    whole, tokenizer, info = load_model_folder(folder)
    check_language(calibration_name, calibration, sources, references, tokenizer)
    languages = info.get("languages")
    words = tokenization(languages.get("target") if isinstance(languages, dict) else None, references)
    gate = Gate(sources, references, words, max_drop=max_drop, beam_size=beam_size, samples=bootstrap, confidence=confidence)
    translator = Translator.of_weights(whole, tokenizer)
    pairs = read_pairs(calibration, translator, calibration_sentences)
    quantized = quantize_model(whole, recipe, pairs, say)
    tell(QuantizationStarted(str(folder), recipe.scheme, recipe.method, len(quantized.names), len(sources)))
    say(f"evaluating on {len(sources)} sentences")
    before = gate.evaluate(translator)
    recovery: dict[str, Any] | None = None
    if recover is not None:
        unrecovered = gate.evaluate(Translator.of_weights(quantized.build(), tokenizer)).value
        quantized, facts = recover(quantized, translator, calibration, pairs, say)
        recovery = {**facts, "unrecovered": unrecovered}
        for one in facts["history"]:
            tell(Recovering(one["step"], one["divergence"]))
    most = math.ceil(len(quantized.names) / 4) if max_raised is None else max_raised
    raised, built, after, trials, costs = _pass(quantized, pairs, gate, before, tokenizer, most, say, tell)
    report = {
        "cvmk": __version__,
        "model": str(folder),
        "recipe": recipe.to_dict(),
        "calibration": {"text": calibration_name, "sentences": len(pairs)},
        "evaluation": {"sentences": len(sources), "beam_size": beam_size, "bootstrap": bootstrap, "confidence": confidence},
        "recovery": recovery,
        **gate.compare(before, after),
        "sizes": _sizes(folder, built, manifest),
        "layers": [_layer(layer, costs) for layer in quantized.layers(built)],
        "raised": raised,
        "trials": trials,
    }
    if not report["gate"]["passed"]:
        names = f" with {len(raised)} of {len(quantized.names)} matrices in a higher precision" if raised else ""
        tell(QuantizationEnded(None, False, report))
        message = f"BLEU falls by {report['gate']['drop']:.2f}{names}, more than {max_drop:g} allowed, and {out} is not written: "
        raise GateFailure(message + "choose another method or scheme, allow more matrices in a higher precision, or a larger drop", report)
    extra = {key: info[key] for key in _MORE if key in info}
    save_model_folder(out, built, tokenizer, _card(report), extra, {REPORT: json.dumps(report, indent=2, ensure_ascii=False) + "\n"})
    tell(QuantizationEnded(str(out), True, report))
    return report


def _check(folder: Path, out: Path, manifest: Manifest, sources: Sequence[str], references: Sequence[str]) -> None:
    schemes = manifest.schemes
    if schemes is not None and any(scheme.type in QUANTIZED for scheme in (schemes.default, *schemes.weights.values())):
        raise ConfigError(f"{folder} is quantised already: quantise the model that it was made of")
    if os.path.realpath(out) == os.path.realpath(folder):
        raise ConfigError(f"{out} is the model itself, which stays as it is: name another folder")
    if out.exists() and not out.is_dir():
        raise DataError(f"cannot write {out}: it is a file, and a model is a folder")
    if not sources:
        raise DataError("the evaluation set is empty: give sentences and their translations")
    if len(sources) != len(references):
        raise DataError(f"the evaluation set has {len(sources)} sources and {len(references)} references: give one for each")


def _pass(
    quantized: Quantized, pairs: Sequence[Pair], gate: Gate, before: Evaluation, tokenizer: Tokenizer, most: int, say: Say, tell: Tell
) -> tuple[list[str], CVMTransformer, Evaluation, list[dict[str, Any]], dict[str, float]]:
    """Raise matrices until the gate passes, or as many as may be: their names, the model, its evaluation, what each trial gave, and what each matrix costs."""
    raised: list[str] = []
    trials: list[dict[str, Any]] = []
    costs: dict[str, float] = {}
    while True:
        built = quantized.build(raised)
        after = gate.evaluate(Translator.of_weights(built, tokenizer))
        trials.append({"raised": len(raised), "value": after.value, "drop": before.value - after.value})
        tell(QuantizationTrial(list(raised), METRICS[0], after.value, before.value - after.value, gate.passes(before, after)))
        if gate.passes(before, after) or len(raised) >= min(most, len(quantized.names)):
            return raised, built, after, trials, costs
        if not costs:
            say("the gate does not pass: looking for the matrices that cost most")
            costs = sensitivities(quantized, pairs)
        raised.append(max((name for name in quantized.names if name not in raised), key=costs.__getitem__))
        say(f"BLEU is {before.value - after.value:.2f} lower: {raised[-1]} is raised")


def _sizes(folder: Path, built: CVMTransformer, manifest: Manifest) -> dict[str, Any]:
    """Bytes of the tensors in the model's file and in the new one, and the new one's share of float32."""
    now = sum(tensor.nbytes for tensor in built.state_dict().values())
    whole = 4 * (manifest.parameters or 0)
    return {"before": (folder / WEIGHTS).stat().st_size, "after": now, "float32": whole, "ratio": now / whole if whole else None}


def _layer(layer: LayerReport, costs: dict[str, float]) -> dict[str, Any]:
    """JSON has no infinity."""
    found = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in layer.to_dict().items()}
    return {**found, "cost": costs.get(layer.name)}


def _card(report: dict[str, Any]) -> str:
    recipe, gate, sizes = report["recipe"], report["gate"], report["sizes"]
    scores = "\n".join(
        f"- {pair['metric']} {pair['value_b']:.2f} -> {pair['value_a']:.2f} ({pair['difference']:+.2f}, {pair['low']:+.2f} to {pair['high']:+.2f})"
        for pair in report["paired"]
    )
    recovery = report["recovery"]
    recovered = f"\nThen it learned for {recovery['best']} steps to say what the model before says." if recovery and recovery["best"] else ""
    return f"""# A quantised model

Made by cvmk {report['cvmk']} of {report['model']}: {recipe['scheme']} by {recipe['method']}, calibrated on {report['calibration']['sentences']} sentences.\
{recovered}

On {report['evaluation']['sentences']} sentences, beam {report['evaluation']['beam_size']}:
{scores}

{sizes['after']} bytes of weights, {sizes['ratio']:.3f} of float32. Allowed to lose: {gate['max_drop']} BLEU. {REPORT} has the rest.
"""
