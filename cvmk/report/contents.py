"""The sections of a report, in their order, made of its figures."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from cvmk.report import trials
from cvmk.report.charts import charts_of, validation_rows
from cvmk.report.comparison import Comparison, ScoreFigure, SetScores, label, verdict
from cvmk.report.document import Block, Bullets, Cell, Document, Folded, Samples, Section, Table, Text
from cvmk.report.figures import Figures
from cvmk.report.quantization import facts, layer_rows, score_rows
from cvmk.report.run import QuantizedModel, Run, pick
from cvmk.report.settings import changed, differing, flat, written
from cvmk.validation.bootstrap import PairedResult

NOTHING = "–"
_PROBLEMS = 30
_LAYERS = 400
_CHANGED = 5
_ADVICE = 20
"""Recommendations that are not folded."""


def document(figures: Figures) -> Document:
    sections = [
        _summary(figures), *map(trials.section, figures.searches), _scores(figures), _curves(figures), _configuration(figures), _samples(figures),
        *(_quantized(model) for model in figures.models), _speed(figures), _environment(figures), _problems(figures),
    ]  # fmt: skip
    searched = {os.path.realpath(path) for search in figures.searches for path in search.rivals()}
    names = [search.name for search in figures.searches] + [run.name for run in figures.runs if os.path.realpath(run.path) not in searched]
    names = names or [model.path.name for model in figures.models]
    title = f"{names[0]} and {len(names) - 1} more" if len(names) > 3 else ", ".join(names)
    return Document(title, _subtitle(figures), [section for section in sections if section.blocks])


def _subtitle(figures: Figures) -> str:
    times = [time_ for run in figures.runs for time_ in (run.history.first_time, run.history.last_time) if time_ is not None]
    days = dict.fromkeys(time.strftime("%Y-%m-%d", time.gmtime(moment)) for moment in (min(times), max(times))) if times else {}
    trained = f"trained {' to '.join(days)}; " if days else ""
    return f"{trained}report by cvmk {figures.cvmk}"


# -- what a reader wants first -------------------------------------------------------------------------------------------------
def _summary(figures: Figures) -> Section:
    section = Section("Summary")
    if figures.runs:
        rows = [[run.name, *_state(run)] for run in figures.runs]
        sets = list(dict.fromkeys(scores.set for scores in figures.scores))
        header = ["run", "state", "weights", "parameters", "iterations", *_deciding(figures.runs, sets)]
        section.blocks.append(Table(header, [[*row, *_deciding_scores(figures, run, sets)] for row, run in zip(rows, figures.runs, strict=True)], texts=3))
    points = [(f"{advice.about}: {advice.rule}" if len(figures.runs) + len(figures.models) > 1 else advice.rule, advice.text) for advice in figures.advice]
    section.blocks.append(Text("Recommendations" if points else "No rule has anything to recommend.", heading=bool(points)))
    if points:
        section.blocks.append(Bullets(points[:_ADVICE]))
    if more := points[_ADVICE:]:
        section.blocks.append(Folded(f"{len(more)} more recommendations", [Bullets(more)]))
    return section


def _state(run: Run) -> list[str]:
    history, report = run.history, run.report
    if pick(report, "diverged"):
        state = "diverged"
    elif report and (history.ended or not history.counts):
        state = "stopped early" if pick(report, "stopped_early") or history.early_stop else "finished"
    else:
        state = "not finished"
    parameters = pick(report, "parameters") or history.parameters
    iterations = history.step or pick(report, "iterations", default=0)
    planned = run.setting("training.iterations")
    size = f"{parameters / 1e6:.2f} M" if isinstance(parameters, (int, float)) else NOTHING
    return [state, str(pick(report, "weights", default=NOTHING)), size, f"{iterations} of {planned}" if planned and planned != iterations else str(iterations)]


def _deciding(runs: Sequence[Run], sets: Sequence[str]) -> list[str]:
    """A column a set: its name and the metric that decides."""
    metrics = list(dict.fromkeys(str(run.setting("validation.metric", "bleu")) for run in runs))
    name = label(metrics[0]) if len(metrics) == 1 else "score"
    return [f"{name}, {set_}" for set_ in sets]


def _deciding_scores(figures: Figures, run: Run, sets: Sequence[str]) -> list[str | Cell]:
    cells: list[str | Cell] = []
    for name in sets:
        scores = next((scores for scores in figures.of(run) if scores.set == name), None)
        cells.append(NOTHING if scores is None or not scores.scores else _score(scores.score(scores.metric)))
    return cells


# -- scores --------------------------------------------------------------------------------------------------------------------
def _scores(figures: Figures) -> Section:
    section = Section("Scores")
    for name in ("validation", "test"):
        found = [scores for scores in figures.scores if scores.set == name]
        if not found:
            continue
        metrics = list(dict.fromkeys(score.metric for scores in found for score in scores.scores))
        counts = {scores.sentences for scores in found if scores.sentences}
        sentences = f", {counts.pop()} sentences" if len(counts) == 1 else ""
        section.blocks.append(Text(f"{name.capitalize()} set{sentences}", heading=True))
        header = ["system", *(["sentences"] if counts else []), *map(label, metrics)]
        rows: list[list[str | Cell]] = [
            [scores.system, *([str(scores.sentences or NOTHING)] if counts else []), *(_score(scores.score(metric)) for metric in metrics)] for scores in found
        ]
        section.blocks.append(Table(header, rows))
        section.blocks += _comparisons([(scores.system, scores.baseline) for scores in found if scores.baseline], "the baseline")
        section.blocks += _comparisons([(scores.system, scores.teacher) for scores in found if scores.teacher], "the teacher")
        section.blocks += _agreement(found)
        told = {comparison.reason for scores in found for comparison in (scores.baseline, scores.teacher) if comparison}
        section.blocks += [Text(f"{note}.", warning=True) for note in dict.fromkeys(note for scores in found for note in scores.notes) if note not in told]
    if section.blocks:
        section.blocks.append(Folded("How these were measured", [_method(figures)]))
    return section


def _comparisons(found: Sequence[tuple[str, Comparison]], with_: str) -> list[Block]:
    others = {comparison.other for _, comparison in found}
    common = others if len(others) == 1 else set()
    rows: list[list[str | Cell]] = []
    for system, comparison in found:
        for pair in comparison.pairs:
            said = verdict(pair)
            tone = {"better": "good", "worse": "bad"}.get(said, "")
            figures = [f"{pair.difference:+.2f}", _span(pair), _p(pair), str(pair.differing)]
            rows.append([system, label(pair.metric), Cell(said, tone), *figures, *([] if common else [comparison.other])])
    header = ["system", "metric", "verdict", "difference", "interval", "p", "sentences that differ", *([] if common else ["against"])]
    title = f"Compared with {with_}, {common.pop()}:" if common else f"Compared with {with_}:"
    blocks: list[Block] = [Text(title), Table(header, rows, texts=3)] if rows else []
    return blocks + [Text(f"No comparison with {with_}: {reason}.", warning=True) for reason in dict.fromkeys(one.reason for _, one in found if one.reason)]


def _agreement(found: Sequence[SetScores]) -> list[Block]:
    metrics = list(dict.fromkeys(score.metric for scores in found for score in scores.agreement))
    rows = [[scores.system, *(_value(next((one for one in scores.agreement if one.metric == metric), None)) for metric in metrics)]
            for scores in found if scores.agreement]  # fmt: skip
    return [Text("Against the teacher's translations in place of the references:"), Table(["system", *map(label, metrics)], rows)] if rows else []


def _method(figures: Figures) -> Bullets:
    percent = f"{100 * figures.confidence:g} %"
    points = [
        ("intervals", f"{percent}, by {figures.bootstrap} bootstrap resamples of the sentences (Koehn 2004)"),
        ("better, worse", f"the {percent} interval of the difference, by the paired bootstrap on the same sentences, leaves out 0; for TER less is better"),
        ("p", "as sacreBLEU's paired bootstrap; several comparisons are not corrected for"),
    ]
    if figures.baseline is not None:
        points.append(("the baseline", figures.baseline.name))
    signatures = dict.fromkeys((score.label, score.signature) for scores in figures.scores for score in scores.scores)
    return Bullets(points + [(name, signature) for name, signature in signatures if signature])


def _score(score: ScoreFigure | None) -> str:
    if score is None or score.value is None:
        return NOTHING
    interval = "" if score.low is None or score.high is None else f" [{score.low:.1f}, {score.high:.1f}]"
    return f"{score.value:.2f}{interval}"


def _value(score: ScoreFigure | None) -> str:
    return NOTHING if score is None or score.value is None else f"{score.value:.2f}"


def _span(pair: PairedResult) -> str:
    return f"[{pair.low:+.2f}, {pair.high:+.2f}]"


def _p(pair: PairedResult) -> str:
    return f"{pair.p_value:.4f}" if pair.p_value >= 0.001 else "< 0.001"


# -- the rest ------------------------------------------------------------------------------------------------------------------
def _curves(figures: Figures) -> Section:
    section = Section("Training")
    charts = charts_of(figures.runs)
    if charts.charts:
        section.blocks.append(charts)
    header, rows = validation_rows(figures.runs)
    if rows:
        section.blocks.append(Folded("Validations as a table", [Table(header, rows, texts=1 if len(figures.runs) > 1 else 0)]))
    told = [(run.name if len(figures.runs) > 1 else "", text) for run in figures.runs for text in _happened(run)]
    if told:
        section.blocks += [Text("What happened", heading=True), Bullets(told)]
    return section


def _happened(run: Run) -> list[str]:
    history = run.history
    notes = [note for note in pick(run.report, "notes", default=[]) if isinstance(note, str)]
    resumed = history.counts["resumed"]
    found = [rollback.text() for rollback in history.rollbacks]
    if len(found) < history.counts["rollback"]:
        found.append(f"{history.counts['rollback'] - len(found)} more rollbacks")
    found += [f"resumed {resumed} times"] if resumed > 1 else ["resumed once"] if resumed else []
    found += [history.early_stop] if history.early_stop else []
    if anomalies := [f"{count} of {quantity.replace('_', ' ')}" for quantity, count in history.anomalies.items() if count]:
        found.append(f"anomalous iterations: {', '.join(anomalies)}, of {history.iterations}")
    return list(dict.fromkeys([*found, *history.notes, *notes]))


def _configuration(figures: Figures) -> Section:
    section = Section("Configuration")
    runs = [run for run in figures.runs if run.config]
    if len(runs) > 1:
        keys = differing([run.config for run in runs])
        if not keys:
            section.blocks.append(Text("The runs have the same configuration."))
        elif len(keys) < len(runs):
            section.blocks.append(Table(["run", *keys], [[run.name, *(keys[key][at] for key in keys)] for at, run in enumerate(runs)], texts=1 + len(keys)))
        else:
            section.blocks.append(Table(["key", *(run.name for run in runs)], [[key, *values] for key, values in keys.items()], texts=1 + len(runs)))
        same = {key: pair for key, pair in changed(runs[0].config).items() if key not in keys and key != "run.folder"}
        if same:
            section.blocks.append(Folded("The same in all runs, and not the default", [_settings(same)]))
    elif runs and (own := changed(runs[0].config)):
        section.blocks += [Text("What is not at its default:"), _settings(own)]
    return section


def _settings(values: dict[str, tuple[str, str]]) -> Table:
    return Table(["key", "value", "default"], [[key, value, default or NOTHING] for key, (value, default) in values.items()], texts=3)


def _samples(figures: Figures) -> Section:
    if not figures.samples:
        return Section("Samples")
    return Section("Samples", [Samples(figures.samples)])


def _quantized(model: QuantizedModel) -> Section:
    section = Section(f"Quantised: {model.path.name}")
    recipe, gate = pick(model.report, "recipe", default={}), pick(model.report, "gate", default={})
    try:
        header, *rows = score_rows(model.report)
        how = f"{recipe['scheme']} by {recipe['method']}, calibrated on {model.report['calibration']['sentences']} sentences"
        said = f"Made of {model.report['model']}: {how}. "
        passed = "passed" if gate["passed"] else "not passed"
        limit = "no limit was set" if gate["max_drop"] is None else f"{gate['max_drop']:g} points of BLEU may be lost: {passed}"
        section.blocks += [Text(said + limit[0].upper() + limit[1:] + "."), Table(list(header), [list(row) for row in rows])]
        section.blocks.append(Bullets([("", fact) for fact in facts(model.report)]))
        header, *rows = layer_rows(model.report)
        section.blocks.append(Folded(f"Every matrix ({len(rows)})", [Table(list(header), [list(row) for row in rows[:_LAYERS]], texts=2)]))
        changes = [[str(one[key]) for key in ("line", "source", "before", "after")] for one in model.report["changed"][:_CHANGED]]
        if changes:
            section.blocks.append(Folded("The sentences that changed most", [Table(["line", "source", "before", "after"], changes, texts=4)]))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        section.blocks[:] = [Text(f"The report of {model.path} is not one that this cvmk can read ({type(error).__name__}: {error}).", warning=True)]
    return section


def _speed(figures: Figures) -> Section:
    section = Section("Speed")
    rows: list[list[str | Cell]] = []
    for run in figures.runs:
        speed, recorded = pick(run.report, "throughput", default={}), run.recorded("validation")
        values = [pick(speed, "target_tokens_per_second"), pick(speed, "iterations_per_second"), pick(speed, "seconds")]
        values += [pick(recorded, "sentences_per_second"), pick(recorded, "tokens_per_second")]
        if any(value is not None for value in values):
            rows.append([run.name, str(pick(run.environment, "device") or run.setting("run.device", NOTHING)), *map(_figure, values)])
    if rows:
        header = ["run", "device", "training, target tokens/s", "iterations/s", "seconds", "validation, sentences/s", "tokens/s"]
        section.blocks.append(Table(header, rows, texts=2))
    for name, values_ in figures.benchmarks:
        section.blocks += _benchmark(name, values_)
    return section


def _benchmark(name: str, figures: dict[str, Any]) -> list[Block]:
    """Timings of `cvmk bench --json` (a row a backend) or of benchmarks/ (a row a case), as a table a file."""
    rows: list[list[str | Cell]] = []
    for row in figures["rows"][:_LAYERS]:
        case = " ".join(str(row[key]) for key in ("op", "case") if key in row)
        seconds = row.get("seconds")
        if isinstance(seconds, dict):
            rows += [[case, str(who), _milliseconds(value), _figure(row.get("ratio")) if who == "cvmk" else ""] for who, value in seconds.items()]
        elif "backend" in row:
            rows.append([case, str(row["backend"]), _milliseconds(seconds), ""])
        else:
            rest = ", ".join(f"{key} {_figure(value)}" for key, value in row.items() if key not in ("op", "case") and not isinstance(value, (dict, list)))
            rows.append([case, rest, "", ""])
    machine = pick(figures, "machine", default={})
    where = f" ({pick(machine, 'processor', default='unknown processor')}, {pick(machine, 'cpus') or 'unknown'} CPUs)" if machine else ""
    return [Text(f"{name}{where}", heading=True), Table(["case", "by", "ms", "ratio to the best other"], rows, texts=2)] if rows else []


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return NOTHING if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _milliseconds(value: Any) -> str:
    return f"{1e3 * value:.3f}" if isinstance(value, (int, float)) else NOTHING


def _environment(figures: Figures) -> Section:
    section = Section("Environment")
    runs = [run for run in figures.runs if run.environment]
    if not runs:
        return section
    unlike = differing([run.environment for run in runs]) if len(runs) > 1 else {}
    if unlike:
        section.blocks += [Text("Where the runs differ:"), Table(["", *(run.name for run in runs)], [[k, *v] for k, v in unlike.items()], texts=1 + len(runs))]
    same = [[key, written(value)] for key, value in flat(runs[0].environment) if key not in unlike and value is not None]
    if same:
        section.blocks.append(Table(["", "value" if len(runs) == 1 else "all runs"], same, texts=2))
    return section


def _problems(figures: Figures) -> Section:
    found = list(dict.fromkeys([*(text for run in figures.runs for text in [*run.problems, *_stale(run)]), *figures.problems]))
    points = [("", text) for text in found[:_PROBLEMS]]
    if len(found) > _PROBLEMS:
        points.append(("", f"and {len(found) - _PROBLEMS} more"))
    return Section("What could not be read", [Bullets(points)] if points else [])


def _stale(run: Run) -> list[str]:
    if run.report and run.history.counts and not run.history.ended:
        return [f"{run.path} went on after its training_report.json was written: its final scores and weights are those of before"]
    return []
