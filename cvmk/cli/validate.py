"""`cvmk validate`: score a model on a test set, compare it with a baseline, and fail where it is not good enough."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from cvmk.cli._arguments import number, points, positive, samples, share
from cvmk.cli._log import add_log, events_into
from cvmk.cli._streams import is_standard, need_open, read_lines
from cvmk.cli._terminal import show, show_json, table
from cvmk.errors import ConfigError, DataError, QualityGateError
from cvmk.hardware import keep_freed_memory

if TYPE_CHECKING:
    from cvmk.telemetry import Event
    from cvmk.validation.bootstrap import PairedResult
    from cvmk.validation.metrics import Measurement
    from cvmk.validation.tokenization import Tokenization

HELP = "score a model against references, with confidence intervals, signatures and a baseline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of the model")
    parser.add_argument("--source", required=True, metavar="FILE", help="sentences to translate, one a line, plain or compressed; - is standard input")
    parser.add_argument("--reference", required=True, metavar="FILE", help="their reference translations, likewise")
    parser.add_argument("--baseline", metavar="MODEL2", help="folder of a model to compare with, by paired bootstrap")
    parser.add_argument("--metrics", nargs="+", default=["bleu", "chrf", "ter"], metavar="METRIC", help="bleu chrf ter rouge bertscore; default: bleu chrf ter")
    parser.add_argument(
        "--tokenize", default="auto", metavar="NAME",
        help="how BLEU finds words: auto (default: by the model's target language), 13a intl zh ja-mecab ko-mecab flores101 flores200 char none",
    )  # fmt: skip
    parser.add_argument("--beam-size", type=positive, default=1, metavar="N", help="beam of the search; default: 1, greedy")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... or auto; default: cpu")
    parser.add_argument("--batch-tokens", type=positive, default=4096, metavar="N", help="tokens translated at a time; default: 4096")
    parser.add_argument("--bootstrap", type=samples, default=1000, metavar="N", help="resamples of the bootstrap; default: 1000")
    parser.add_argument("--confidence", type=share, default=0.95, metavar="SHARE", help="confidence of the intervals; default: 0.95")
    parser.add_argument(
        "--min-score", action="append", default=[], metavar="METRIC=VALUE", help="exit 3 if the score is worse (for ter: larger) than VALUE; may be repeated"
    )
    parser.add_argument("--max-drop", type=points, metavar="X", help="exit 3 if the first metric is more than X points worse than the baseline's")
    add_log(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    from cvmk.inference.options import SearchOptions
    from cvmk.validation.tokenization import check_tokenizer

    need_open(sys.stdout, "output")
    SearchOptions(beam_size=arguments.beam_size)
    limits = [_limit(text) for text in arguments.min_score]
    metrics = _metrics(arguments.metrics, [metric for metric, _ in limits])
    check_tokenizer(arguments.tokenize, "--tokenize")
    if arguments.max_drop is not None and arguments.baseline is None:
        raise ConfigError("--max-drop needs a model to compare with: give --baseline MODEL2")
    if is_standard(arguments.source) and is_standard(arguments.reference):
        raise ConfigError("--source and --reference are both standard input: name a file for one of them")
    sources, references = read_lines(arguments.source), read_lines(arguments.reference)
    if len(sources) != len(references):
        raise DataError(
            f"{arguments.source} has {len(sources)} lines but {arguments.reference} has {len(references)}: the two files must be aligned line by line"
        )
    # Whatever a library prints must not mix with the JSON.
    with events_into(arguments.log) as tell, contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        report = _report(arguments, metrics, limits, sources, references)
        for system in filter(None, (report, report["baseline"])):
            tell(_event(system, arguments.confidence))
    if arguments.json:
        show_json(report)
    else:
        show(_text(report))
    failed = [gate["message"] for gate in report["gates"] if not gate["passed"]]
    if failed:
        raise QualityGateError("; ".join(failed))
    return 0


def _report(arguments: argparse.Namespace, metrics: list[str], limits: list[tuple[str, float]], sources: list[str], references: list[str]) -> dict[str, Any]:
    from cvmk.inference import Translator
    from cvmk.validation.bootstrap import paired_of
    from cvmk.validation.tokenization import tokenization

    keep_freed_memory()
    translator = Translator(arguments.model, device=arguments.device)
    baseline = None if arguments.baseline is None else Translator(arguments.baseline, device=arguments.device)
    language = _target_language(translator) or (None if baseline is None else _target_language(baseline))
    words = tokenization(language, references, arguments.tokenize, "--tokenize")
    system, measurements = _system(arguments, arguments.model, translator, metrics, sources, references, words)
    report: dict[str, Any] = {
        "source": arguments.source,
        "reference": arguments.reference,
        "beam_size": arguments.beam_size,
        "device": arguments.device,
        "bootstrap": arguments.bootstrap,
        "confidence": arguments.confidence,
        "language": language,
        "notes": _notes(metrics, references, words),
        **system,
        "baseline": None,
    }
    drop: PairedResult | None = None
    if baseline is not None:
        other, others = _system(arguments, arguments.baseline, baseline, metrics, sources, references, words)
        pairs = [paired_of(ours, theirs, arguments.bootstrap, arguments.confidence) for ours, theirs in zip(measurements, others, strict=True)]
        report["baseline"] = {**other, "paired": [pair.to_dict() for pair in pairs]}
        drop = pairs[0]
    values = {measurement.score.metric: measurement.score.value for measurement in measurements}
    gates = [_score_gate(metric, values[metric], limit) for metric, limit in limits]
    if arguments.max_drop is not None and drop is not None:
        gates.append(_drop_gate(drop, arguments.max_drop))
    report["gates"] = gates
    report["passed"] = all(gate["passed"] for gate in gates)
    return report


def _event(system: dict[str, Any], confidence: float) -> Event:
    from cvmk.telemetry.schema import Evaluation

    main = {"step": 0, "agreement": [], "confidence": confidence} | {name: system["scores"][0][name] for name in ("metric", "value", "low", "high")}
    return Evaluation.of(system | main)


def _target_language(translator: Any) -> str | None:
    """The target language that the model's config.json names."""
    languages = getattr(translator, "info", {}).get("languages")
    language = languages.get("target") if isinstance(languages, dict) else None
    return language if isinstance(language, str) and language else None


def _notes(metrics: list[str], references: list[str], words: Tokenization) -> list[str]:
    """What a reader of the scores should know: a tokeniser that is missing, metrics that cannot judge this text."""
    from cvmk.validation.metrics import blind_spot

    notes = []
    if words.note and not {"bleu", "ter"}.isdisjoint(metrics):
        notes.append(words.note + (f"; chrF judges such text better: --metrics {words.better}" if words.better and words.better not in metrics else ""))
    return notes + [note for metric in metrics if (note := blind_spot(metric, references, words)) is not None]


def _system(
    arguments: argparse.Namespace, name: str, translator: Any, metrics: list[str], sources: list[str], references: list[str], words: Tokenization
) -> tuple[dict[str, Any], list[Measurement]]:
    """Translate and score: what the report says of one model, and its measurements."""
    from cvmk.validation.bootstrap import interval_of
    from cvmk.validation.metrics import measure
    from cvmk.validation.validator import translate

    start = time.perf_counter()
    hypotheses, tokens = translate(translator, sources, arguments.beam_size, max_batch_tokens=arguments.batch_tokens, on_long="truncate", scores=False)
    seconds = time.perf_counter() - start
    measurements = [measure(metric, hypotheses, references, words) for metric in metrics]
    scores = []
    for measurement in measurements:
        low, high = interval_of(measurement, arguments.bootstrap, arguments.confidence)
        scores.append({**measurement.score.to_dict(), "low": low, "high": high})
    rates = {"sentences_per_second": len(sources) / seconds, "tokens": tokens, "tokens_per_second": None if tokens is None else tokens / seconds}
    return {"model": name, "sentences": len(sources), "seconds": seconds, **rates, "scores": scores}, measurements


def _score_gate(metric: str, value: float, limit: float) -> dict[str, Any]:
    from cvmk.validation.metrics import display_name, good_direction

    direction = good_direction(metric)
    side = "below" if direction > 0 else "above"
    return {
        "gate": "min-score",
        "metric": metric,
        "limit": limit,
        "value": value,
        "passed": (value - limit) * direction >= 0,
        "message": f"{display_name(metric)} is {value:.2f}, {side} the limit of {limit:g}",
    }


def _drop_gate(pair: PairedResult, limit: float) -> dict[str, Any]:
    from cvmk.validation.metrics import display_name

    return {
        "gate": "max-drop",
        "metric": pair.metric,
        "limit": limit,
        "value": -pair.gain,
        "passed": -pair.gain <= limit,
        "message": f"{display_name(pair.metric)} is {-pair.gain:.2f} worse than the baseline's (p = {pair.p_value:.3f}), more than {limit:g} allowed",
    }


def _text(report: dict[str, Any]) -> str:
    """The report for people."""
    percent = f"{100 * report['confidence']:g}% interval"
    parts = [_model_text(report, percent)]
    baseline = report["baseline"]
    if baseline is not None:
        parts.append(_model_text(baseline, percent, "Baseline "))
        rows = [("metric", "model", "baseline", "difference", percent, "p")]
        for score, pair in zip(report["scores"], baseline["paired"], strict=True):
            values = (f"{pair['value_a']:.2f}", f"{pair['value_b']:.2f}", f"{pair['difference']:+.2f}", f"[{pair['low']:+.2f}, {pair['high']:+.2f}]")
            rows.append((_label(score), *values, f"{pair['p_value']:.4f}"))
        parts.append(f"Paired bootstrap, {report['bootstrap']} resamples\n{table(rows)}")
    parts += [f"Note: {note}" for note in report["notes"]]
    if report["gates"] and report["passed"]:
        parts.append("All quality gates passed.")
    return "\n\n".join(parts)


def _model_text(system: dict[str, Any], percent: str, prefix: str = "") -> str:
    tokens = "" if system["tokens_per_second"] is None else f", {system['tokens_per_second']:.0f} tokens/s"
    speed = f"{system['sentences']} sentences in {system['seconds']:.2f} s, {system['sentences_per_second']:.1f} sentences/s{tokens}"
    rows = [("metric", "score", percent, "signature")]
    for score in system["scores"]:
        rows.append((_label(score), f"{score['value']:.2f}", f"[{score['low']:.2f}, {score['high']:.2f}]", score["signature"]))
    return f"{prefix}{system['model']}: {speed}\n{table(rows)}"


def _label(score: dict[str, Any]) -> str:
    from cvmk.validation.metrics import Score

    return Score(score["metric"], score["value"], score["signature"], score["fallback"]).label


def _metrics(given: list[str], limited: list[str]) -> list[str]:
    """The metrics to compute, each once: those of --metrics (blanks or commas between them), then those that only --min-score names."""
    from cvmk.validation.metrics import check_metric

    names = [name for text in given for name in text.split(",") if name] + limited
    for name in names:
        check_metric(name)
    if not names:
        raise ConfigError("--metrics names no metric: give one at least, such as bleu")
    return list(dict.fromkeys(names))


def _limit(text: str) -> tuple[str, float]:
    metric, separator, value = text.partition("=")
    try:
        if not separator:
            raise ValueError
        return metric, number(value)
    except ValueError:
        raise ConfigError(f"--min-score {text!r} is not METRIC=VALUE: write for example --min-score bleu=30") from None
