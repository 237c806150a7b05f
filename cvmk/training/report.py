"""The report of a finished run, and the card of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cvmk.config import TrainConfig
from cvmk.config.schema import Recipe
from cvmk.nn import count_parameters
from cvmk.report.names import TRAINING_REPORT
from cvmk.telemetry import environment
from cvmk.validation import Score, ValidationResult

if TYPE_CHECKING:
    from cvmk.text.cache import TokenizedCorpus
    from cvmk.training.state import TrainingState

REPORT = TRAINING_REPORT


@dataclass(frozen=True)
class Outcome:
    """What came of a training: which weights were chosen, and how good they are."""

    weights: str
    validation: ValidationResult
    test: ValidationResult | None
    diverged: str | None
    """Why training gave up, where it did: the weights are then those of the best checkpoint before."""
    notes: list[str]
    """Sentences that a reader of the scores should know."""


def training_report(
    config: TrainConfig, recipe: Recipe, title: str, state: TrainingState, corpus: TokenizedCorpus, outcome: Outcome, teacher: dict[str, Any] | None
) -> dict[str, Any]:
    """Everything that a reader of the run wants to know, JSON-ready. Seconds are of training alone; tokens are target tokens."""
    progress = state.progress
    return {
        "title": title,
        "languages": [config.data.source_language, config.data.target_language],
        "parameters": count_parameters(state.model),
        "pairs": {"trained_on": len(corpus), "skipped": corpus.report.skipped},
        "vocabulary": state.model.vocab_size,
        "iterations": progress.step,
        "stopped_early": progress.finished,
        "rollbacks": progress.rollbacks,
        "diverged": outcome.diverged,
        "throughput": {
            "target_tokens": progress.tokens,
            "seconds": round(progress.seconds, 2),
            "target_tokens_per_second": round(progress.tokens_per_second, 1),
            "iterations_per_second": round(progress.step / progress.seconds, 3) if progress.seconds else None,
        },
        "losses": {"first": progress.first_loss, "last": progress.losses},
        "weights": outcome.weights,
        "validation": outcome.validation.to_dict(),
        "test": outcome.test.to_dict() if outcome.test is not None else None,
        "notes": outcome.notes,
        "teacher": teacher,
        "model": recipe.model.model_dump(),
        "distillation": config.distillation.model_dump() if teacher is not None else None,
        "environment": environment() | {"device": str(state.device)},
    }


def model_card(report: dict[str, Any]) -> str:
    """The model folder's `card.md`."""
    source, target = report["languages"]
    lines = [
        f"# {_title(source, target)}",
        "",
        f"Made with cvmk {report['environment']['cvmk']}: {report['parameters'] / 1e6:.2f} M parameters, vocabulary {report['vocabulary']}, "
        f"{report['iterations']} iterations on {report['pairs']['trained_on']} pairs; {report['weights']}.",
        "",
    ]
    if unknown := unknown_languages(source, target):
        lines += [f"{unknown}.", ""]
    if report["teacher"] is not None:
        lines += [f"Distilled from a teacher of {report['teacher']['parameters'] / 1e6:.2f} M parameters.", ""]
    for name in ("validation", "test"):
        if report[name] is not None:
            lines += [f"## Scores, {name} ({report[name]['sentences']} sentences)", "", *score_lines(report[name]), ""]
    names = [f"text.{source or 'in'}", f"text.{target or 'out'}"]
    lines += [f"Use: `cvmk translate MODEL < {names[0]} > {names[1]}`", ""]
    return "\n".join(lines)


def unknown_languages(source: str | None, target: str | None) -> str:
    """A sentence about the languages that the configuration does not name, or nothing."""
    sides = [side for side, tag in (("source", source), ("target", target)) if not tag]
    keys = " and ".join(f"data.{side}_language" for side in sides)
    return f"The {' and '.join(sides)} language{'s are' if len(sides) > 1 else ' is'} unknown, because the configuration does not give {keys}" if sides else ""


def _title(source: str | None, target: str | None) -> str:
    if source and target:
        return f"{source} to {target} translation model"
    return "Translation model" + (f" from {source}" if source else "") + (f" into {target}" if target else "")


def score_lines(result: dict[str, Any]) -> list[str]:
    """One line a score: against the references, then against the teacher's own output."""
    lines = [_line(Score.from_dict(score)) for score in result["scores"]]
    lines += [_line(Score.from_dict(score)) + " (against the teacher's output)" for score in result["agreement"]]
    return lines


def _line(score: Score) -> str:
    fallback = " (built-in fallback)" if score.fallback else ""
    return f"- {score.metric} {score.value:.2f}{fallback}  `{score.signature}`"
