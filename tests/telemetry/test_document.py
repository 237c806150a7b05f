"""docs/telemetry.md has the schema as it is. `python tests/telemetry/test_document.py` writes it there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cvmk.telemetry.schema import EVENTS, Event

DOCUMENT = Path(__file__).parents[2] / "docs" / "telemetry.md"
BEGIN, END = "<!-- schema -->\n", "<!-- end of schema -->\n"


def table() -> str:
    lines = ["| event | version | fields |", "|---|---|---|"]
    lines += [f"| `{event.KIND}`: {_first_sentence(event)} | {event.VERSION} | {', '.join(map(_field, dataclasses.fields(event)))} |" for event in EVENTS]
    return "\n".join(lines) + "\n"


def _first_sentence(event: type[Event]) -> str:
    text = " ".join((event.__doc__ or "").split())
    return event.__name__ if text.startswith(f"{event.__name__}(") else text.split(". ")[0].rstrip(".")


def _field(one: dataclasses.Field[object]) -> str:
    required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    kind = str(one.type).replace(" | ", " or ").replace("None", "null")
    return f"`{one.name}` {kind}" + ("" if required else " (default)")


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="a source distribution has no documents")
def test_the_schema_stands_in_the_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), f"write it anew: python {Path(__file__).name}"


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
