"""Which numbers of which events are charts, in the order of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cvmk.telemetry.schema import Scored


class Chart(NamedTuple):
    """A chart over one field of one kind of event."""

    kind: str
    field: str
    group: str
    title: str
    unit: str = ""
    is_part: bool = False
    """Whether it is left out where it is 0 throughout: a part that is not used."""

    @property
    def is_of_teacher(self) -> bool:
        """Whether it is of scores against the teacher's translations."""
        return self.field.startswith(_TEACHER)

    @property
    def key(self) -> str:
        return f"{self.kind}.{self.field}"


CHARTS = (
    Chart("step", "loss", "Loss", "Loss"),
    Chart("step", "cross_entropy", "Loss", "Cross-entropy", is_part=True),
    Chart("step", "logits", "Loss", "Distillation of logits", is_part=True),
    Chart("step", "hidden", "Loss", "Distillation of hidden states", is_part=True),
    Chart("step", "attention", "Loss", "Distillation of attention maps", is_part=True),
    Chart("step", "learning_rate", "Optimisation", "Learning rate"),
    Chart("step", "gradient_norm", "Optimisation", "Gradient norm"),
    Chart("step", "tokens_per_second", "Speed and machine", "Throughput", "tokens/s"),
)
SCORES = "Validation"
"""The group of the charts of scores, which are named by the events: one a metric, against the references and against the teacher."""
MOST_SCORES = 24
_TEACHER = "teacher "

GROUPS = ("Loss", SCORES, "Optimisation", "Speed and machine")
"""The groups in the order of the page."""

FIELDS = {kind: tuple(chart.field for chart in CHARTS if chart.kind == kind) for kind in {chart.kind for chart in CHARTS}}
METRICS = {"bleu": "BLEU", "chrf": "chrF", "ter": "TER", "comet": "COMET", "bertscore": "BERTScore", "rouge": "ROUGE"}


def numbers(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The fields of an event that are charts."""
    return {name: value for name in FIELDS[kind] if isinstance(value := values.get(name), (int, float))}


def scores(event: Scored) -> dict[str, float]:
    """The scores of a validation, by metric; "teacher METRIC" where the teacher is the reference."""
    found: dict[str, float] = {}
    for prefix, given in (("", event.scores), (_TEACHER, event.agreement)):
        for score in given:
            name, value = score.get("metric"), score.get("value")
            if isinstance(name, str) and isinstance(value, (int, float)) and len(found) < MOST_SCORES:
                found[prefix + name[:40]] = value
    return found


def score_chart(field: str) -> Chart:
    """The chart of a field that `scores` gave."""
    metric = field.removeprefix(_TEACHER)
    title = METRICS.get(metric, metric)
    return Chart("validation", field, SCORES, title if metric == field else f"{title} against the teacher")
