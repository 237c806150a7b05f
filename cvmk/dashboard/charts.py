"""Which of the numbers that events have (`cvmk.telemetry.curves`) are charts, and how they are called."""

from __future__ import annotations

import re
from typing import NamedTuple

_SPEED, _SERVICE = "Speed and machine", "Service"
GROUPS = ("Loss", "Validation", "Optimisation", _SERVICE, _SPEED)
"""In the order of the page."""
ITERATION = "iteration"
"""The table of what every iteration has."""


class Chart(NamedTuple):
    """A chart of the points of one name."""

    name: str
    group: str
    title: str
    unit: str = ""
    factor: float = 1.0
    """By which a number is to be multiplied for its unit."""
    is_part: bool = False
    """Whether it is left out where it is 0 throughout: what is not used, or does not happen."""

    @property
    def table(self) -> str:
        """Where its numbers are kept: those that come together, and as often, stand in one table."""
        prefix = self.name.partition("/")[0] if "/" in self.name else ITERATION
        return {"agreement": "validation"}.get(prefix, "machine" if self.group == _SPEED and "/" in self.name else prefix)


_KNOWN = {chart.name: chart for chart in (
    Chart("loss", "Loss", "Loss"),
    Chart("loss/cross_entropy", "Loss", "Cross-entropy", is_part=True),
    Chart("loss/logits", "Loss", "Distillation of logits", is_part=True),
    Chart("loss/hidden", "Loss", "Distillation of hidden states", is_part=True),
    Chart("loss/attention", "Loss", "Distillation of attention maps", is_part=True),
    Chart("epoch/loss", "Loss", "Mean loss of an epoch"),
    Chart("learning_rate", "Optimisation", "Learning rate"),
    Chart("gradient_norm", "Optimisation", "Gradient norm"),
    Chart("epoch/anomalies", "Optimisation", "Anomalies in an epoch", is_part=True),
    Chart("service/requests", _SERVICE, "Requests", "a second"),
    Chart("service/failures", _SERVICE, "Requests that failed", "a second", is_part=True),
    Chart("service/rejections", _SERVICE, "Rejected", "a second", is_part=True),
    Chart("service/sessions", _SERVICE, "Open sessions", is_part=True),
    Chart("service/loop_lag", _SERVICE, "Lag of the event loop", "ms", 1000),
    Chart("tokens_per_second", _SPEED, "Throughput", "tokens/s"),
    Chart("seconds", _SPEED, "Time of an iteration", "s"),
    Chart("data_wait", _SPEED, "Wait for data", "s"),
    Chart("process/cpu", _SPEED, "CPU of the process", "cores"),
    Chart("machine/cpu", _SPEED, "CPU of the machine", "%", 100),
    Chart("process/memory", _SPEED, "Memory of the process", "GB", 1e-9),
    Chart("machine/memory", _SPEED, "Memory of the machine", "GB", 1e-9),
)}  # fmt: skip
_PLACES = {name: place for place, name in enumerate(_KNOWN)}
METRICS = {"bleu": "BLEU", "chrf": "chrF", "ter": "TER", "comet": "COMET", "bertscore": "BERTScore", "rouge": "ROUGE"}
_OF_A_MODEL = {
    "translations": ("Translations", "a second", 1.0), "queue_seconds": ("Wait in the queue", "ms", 1000.0),
    "decode_seconds": ("Time of a translation", "ms", 1000.0),
    "first_text_seconds": ("Until a stream's first text", "ms", 1000.0), "characters": ("Characters of streams", "a second", 1.0),
    "waiting_tokens": ("Tokens that wait", "", 1.0), "running_tokens": ("Tokens in work", "", 1.0),
}  # fmt: skip
_ALWAYS = ("translations", "queue_seconds", "decode_seconds")
_GPU = re.compile(r"gpu(\d+)/(use|memory)")
ANOMALIES = {"loss": "loss", "gradient_norm": "gradient_norm", "throughput": "tokens_per_second", "data_wait": "data_wait"}
"""The chart of an anomaly's quantity."""


def chart(name: str) -> Chart | None:
    """The chart of a point's name; None where there is none."""
    if name in _KNOWN:
        return _KNOWN[name]
    kind, _, rest = name.partition("/")
    if kind in ("validation", "agreement"):
        title = METRICS.get(rest, rest[:40])
        return Chart(name, "Validation", title if kind == "validation" else f"{title} against the teacher")
    quantity, _, model = rest.partition("/")
    if kind == "service" and quantity in _OF_A_MODEL:
        title, unit, factor = _OF_A_MODEL[quantity]
        return Chart(name, _SERVICE, f"{title}: {model[:40]}", unit, factor, is_part=quantity not in _ALWAYS)
    if (gpu := _GPU.fullmatch(name)) is not None:
        what, unit, factor = ("Use", "%", 100.0) if gpu[2] == "use" else ("Memory", "GB", 1e-9)
        return Chart(name, _SPEED, f"{what} of GPU {gpu[1]}", unit, factor)
    return None


def order(one: Chart) -> tuple[int, int, str]:
    """Of the charts on the page: by group, and scores against the references first."""
    of_a_model = one.name.split("/")[1] if one.group == _SERVICE else ""
    later = 1000 + (list(_OF_A_MODEL).index(of_a_model) if of_a_model in _OF_A_MODEL else one.name.startswith("agreement/"))
    return GROUPS.index(one.group), _PLACES.get(one.name, later), one.name
