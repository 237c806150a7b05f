"""`cvmk doctor --check`: every backend of every op on every kind of device here, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cvmk.cli._terminal import complain, show
from cvmk.errors import ConfigError, DataError, QualityGateError
from cvmk.libraries import check_environment

if TYPE_CHECKING:
    import torch

    from cvmk.ops._check import Row


def check(*, quiet: bool) -> list[Row]:
    """The rows, shown one by one as they come unless `quiet`; what was found about a kind of GPU is remembered for this user.

    Raises ConfigError where the ops cannot be imported.
    """
    check_environment()
    try:
        from cvmk.ops import _check, _measured
    except ImportError as error:
        raise ConfigError(f"the ops cannot be checked, for they do not load ({error}): cvmk doctor tells more") from error
    found: list[Row] = []
    for device in _devices():
        rows: list[Row] = []
        for row in _check.rows(device):
            if not quiet:
                _show_row(row, rows[-1] if rows else None)
            rows.append(row)
        kind = _measured.device_class(device)
        if kind is not None:
            _remember(kind, rows)
        found += rows
    return found


def judge(rows: Sequence[Row], *, quiet: bool) -> None:
    """Raises QualityGateError where a row is wrong."""
    checked = [row for row in rows if row.passed is not None]
    wrong = [row for row in checked if not row.passed]
    if wrong:
        names = list(dict.fromkeys(f"{row.backend} {row.op}" for row in wrong))
        raise QualityGateError(f"{len(wrong)} of {len(checked)} checks failed ({', '.join(names)}): do without these backends (CVMK_BACKEND) and report it")
    if not quiet:
        show(f"\nAll {len(checked)} checks passed on {', '.join(dict.fromkeys(row.device for row in rows))}.")


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _devices() -> Iterator[torch.device]:
    """The CPU, and one GPU of each kind."""
    import torch

    from cvmk.ops import _measured

    yield torch.device("cpu")
    kinds = set()
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if (kind := _measured.device_class(device)) not in kinds:
            kinds.add(kind)
            with torch.cuda.device(device):
                yield device


def _show_row(row: Row, before: Row | None) -> None:
    if before is None or (before.op, before.device) != (row.op, row.device):
        show(f"{row.op} on {row.device}")
    if row.passed is None:
        what = f"{row.case}, {row.which}: " if row.case else ""
        show(f"  {row.backend:<10} {what}not checked: {'; '.join(reason.removeprefix(f'{row.backend}: ') for reason in row.reasons)}")
        return
    numbers = "" if row.error is None or row.seconds is None else f"error {row.error:.1e} of {row.tolerance:.1e}  {row.seconds * 1e3:8.3f} ms"
    verdict = "right" if row.passed else "; ".join(["WRONG", *row.reasons])
    show(f"  {row.backend:<10} {f'{row.case}, {row.which}':<66} {numbers}  {verdict}")


def _remember(kind: str, rows: Sequence[Row]) -> None:
    """Keep for each backend whether all its checks passed on this kind of device."""
    from cvmk import files
    from cvmk.ops import _measured

    results: dict[str, bool] = {}
    for row in rows:
        if row.passed is not None and row.backend != "reference":
            results[row.backend] = results.get(row.backend, True) and row.passed
    try:
        files.write_json(_measured.record_path(), _measured.with_result(_measured.record(), kind, results))
    except (DataError, RuntimeError) as error:  # RuntimeError: there is no home
        complain(f"the result is not remembered: {error}")
    _measured.forget()
