"""Every rule: figures on which it speaks, and figures on which it is silent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_folders import sentences, step, validation, worse, write_run

from cvmk.report import figures_of
from cvmk.report.advice import QUANTIZATION_RULE, QUANTIZATION_WHEN, RULES, SEARCH_RULES, advise
from cvmk.report.run import QuantizedModel
from cvmk.telemetry.schema import Anomaly, EarlyStop, Event, Iterations, Rollback

DOCS = Path(__file__).parents[2] / "docs" / "report.md"
_, REFERENCES = sentences(60)


def validations(*values: float) -> list[Event]:
    return [validation(10 * at, value, best=value >= max(values[:at])) for at, value in enumerate(values, 1)]


def losses(*values: float) -> list[Event]:
    return [step(10 * at, loss=value) for at, value in enumerate(values, 1)]


def iterations(count: int, wait: float = 0.0) -> Iterations:
    return Iterations(1, [2.0] * count, [1e-3] * count, [0.5] * count, [100] * count, [1.0] * count, [wait] * count)


def anomalies(quantity: str, count: int) -> list[Event]:
    return [Anomaly(at, quantity, 9.0, 2.0) for at in range(1, count + 1)]


FALLING = losses(*(10 / at for at in range(1, 11)))
NO_METRIC = {"validation.metrics": ["bleu"]}

CASES: dict[str, tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]] = {
    "still-improving": (
        [{"events": validations(10, 20, 25, 30)}, {"events": validations(10, 20, 25, 26)}],
        [
            {"events": validations(10, 20, 25, 25.2)},  # less than 2 %
            {"events": validations(10, 20, 30, 25)},
            {"events": validations(10, 30)},
            {"events": [*validations(10, 20, 25, 30), EarlyStop(40, "patience")]},
            {"events": [*validations(10, 20, math.nan, math.nan)]},
        ],
    ),
    "over-fitting": (
        [{"events": [*FALLING, *validations(10, 20, 30, 31, 30, 30, 29, 29, 29, 28)]}],
        [
            {"events": [*losses(*[2.0] * 10), *validations(10, 20, 30, 31, 30, 30, 29, 29, 29, 28)]},
            {"events": [*FALLING, *validations(10, 20, 30, 31, 32, 33, 34, 35, 36, 37)]},
            {"events": validations(10, 20, 30, 31, 30, 30, 29, 29, 29, 28)},  # the loss is not known
        ],
    ),
    "plateau": (
        [{"events": [*losses(*[2.0] * 10), *validations(10, 20, 30, 31, 30, 30, 29, 29, 29, 28)]}],
        [{"events": [*FALLING, *validations(10, 20, 30, 31, 30, 30, 29, 29, 29, 28)]}, {"events": validations(10, 20, 30)}],
    ),
    "rolled-back": (
        [{"events": [Rollback(20, 10, "the loss is nan", 1)]}, {"report": {"diverged": "training diverged", "weights": "x", "validation": {}, "test": None}}],
        [{"events": validations(10, 20)}],
    ),
    "clipping": (
        [{"events": [step(1000 + at, norm=1.5) for at in range(1, 30)]}],
        [
            {"events": [step(1000 + at, norm=0.5) for at in range(1, 30)]},
            {"events": [step(at, norm=1.5) for at in range(1, 30)]},  # in the warm-up
            {"events": [step(1000 + at, norm=1.5) for at in range(1, 30)], "config": {"training.clip_norm": 0.0}},
        ],
    ),
    "not-finite": ([{"events": [step(1, loss=math.nan)]}, {"events": [step(1, norm=math.inf)]}], [{"events": [step(1)]}]),
    "anomalies": (
        [{"events": [iterations(100), *anomalies("loss", 3)]}],
        [{"events": [iterations(100), *anomalies("loss", 2)]}, {"events": [iterations(1000), *anomalies("loss", 9)]}],
    ),
    "data-wait": ([{"events": [iterations(10, 0.2)]}], [{"events": [iterations(10, 0.05)]}, {"events": [step(1)]}]),
    "uneven-speed": (
        [{"events": [iterations(100), *anomalies("throughput", 5)]}],
        [{"events": [iterations(100), *anomalies("loss", 5)]}],
    ),
    "nothing-measured": (
        [{"events": validations(0, 0)}, {"events": validations(math.nan, math.nan)}],
        [{"events": validations(0)}, {"events": validations(0, 1)}],
    ),
    "far-from-teacher": (
        [{"hypotheses": worse(REFERENCES, 2), "teacher": REFERENCES, "config": NO_METRIC}],
        [{"hypotheses": REFERENCES, "teacher": REFERENCES, "config": NO_METRIC}, {"hypotheses": worse(REFERENCES, 2), "config": NO_METRIC}],
    ),
    "weak-teacher": (
        [{"hypotheses": REFERENCES, "teacher": worse(REFERENCES, 2), "config": NO_METRIC}, {"hypotheses": REFERENCES, "teacher": REFERENCES}],
        [{"hypotheses": worse(REFERENCES, 2), "teacher": REFERENCES, "config": NO_METRIC}],
    ),
    "few-sentences": (
        [{"hypotheses": worse(REFERENCES, 2), "config": NO_METRIC}],
        [{"hypotheses": REFERENCES, "config": NO_METRIC}],
    ),
    "length": (
        [{"hypotheses": [text.split()[0] for text in REFERENCES]}, {"hypotheses": [f"{text} {text}" for text in REFERENCES]}],
        [{"hypotheses": REFERENCES}],
    ),
    "degenerate": (
        [{"hypotheses": ["", "", *REFERENCES[2:]]}, {"hypotheses": ["the the the the", "a no no no no", *REFERENCES[2:]]}],
        [{"hypotheses": ["", *REFERENCES[1:]]}, {"hypotheses": ["very very very good", *REFERENCES[1:]]}],
    ),
}  # fmt: skip


def spoken(folder: Path, case: dict[str, Any]) -> dict[str, str]:
    write_run(folder, **{"events": [], "hypotheses": None, **case})
    return {advice.rule: advice.text for advice in figures_of([folder], bootstrap=100).advice}


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_speaks_and_is_silent(tmp_path: Path, rule: str) -> None:
    speaks, silent = CASES[rule]
    for at, case in enumerate(speaks):
        assert rule in spoken(tmp_path / f"speaks{at}", case), (at, "is silent")
    for at, case in enumerate(silent):
        assert rule not in (found := spoken(tmp_path / f"silent{at}", case)), (at, found)


def test_every_rule_is_tested_and_documented_as_it_is() -> None:
    names = [rule.name for rule in RULES]
    assert set(names) - {"no-better-than-baseline"} == set(CASES)  # that one needs two runs: test_comparison
    text = DOCS.read_text(encoding="utf-8")
    for name, when in [*((rule.name, rule.when) for rule in RULES), (QUANTIZATION_RULE, QUANTIZATION_WHEN), *SEARCH_RULES.items()]:
        assert f"| `{name}` | {when} |" in text, f"docs/report.md lacks the row of {name}: {when}"


def test_a_recommendation_names_figures_and_keys(tmp_path: Path) -> None:
    text = spoken(tmp_path / "run", {"events": validations(10, 20, 25, 30)})["still-improving"]
    assert text.startswith("BLEU still rose by 5.00 points in the last quarter of the training and was best at its end, iteration 40: train longer")
    assert text.endswith("(training.iterations = 60 or more)")


def test_less_is_better_for_ter(tmp_path: Path) -> None:
    def ter(*values: float) -> list[Event]:
        scores = [{"metric": "ter", "value": value, "signature": "", "fallback": False} for value in values]
        return [validation(10 * at, value, metric="ter", scores=[score]) for at, (value, score) in enumerate(zip(values, scores, strict=True), 1)]

    config = {"validation.metric": "ter"}
    assert "still-improving" in spoken(tmp_path / "falls", {"events": ter(90, 70, 60, 50), "config": config})
    assert "still-improving" not in spoken(tmp_path / "rises", {"events": ter(50, 60, 70, 90), "config": config})


@pytest.mark.parametrize(("low", "high", "speaks"), [(-1.2, -0.3, True), (-0.5, 0.4, False), (None, None, False)])
def test_what_quantisation_costs(low: float | None, high: float | None, speaks: bool) -> None:
    pair = {"metric": "bleu", "difference": -0.7, "low": low, "high": high}
    model = QuantizedModel(Path("small"), {"paired": [pair], "recipe": {"method": "smoothquant"}, "recovery": None})
    found = advise([], [model, QuantizedModel(Path("odd"), {"paired": 7})])
    assert [advice.rule for advice in found] == ([QUANTIZATION_RULE] if speaks else [])
