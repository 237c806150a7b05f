"""docs/serving.md says what the protocol has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cvmk.config.serve import LimitsConfig
from cvmk.serving import messages
from cvmk.serving.errors import Status

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
if not DOCUMENT.is_file():
    pytest.skip("a source distribution has no documents", allow_module_level=True)
TEXT = DOCUMENT.read_text(encoding="utf-8")
CODE = set(re.findall(r"`([^`\n]+)`", TEXT))
NOT_OVER_GRPC = {Status.CANCELLED, Status.ABORTED, Status.UNIMPLEMENTED}


def test_every_field_of_a_stream_is_explained_and_none_other() -> None:
    for name in ("StreamRequest", "StreamResponse", "Append", "Replace", "Policy"):
        told = {part for one in CODE for part in one.split(".")}
        assert {field.name for field in messages.FILE.message_types_by_name[name].fields} <= told, name
    dotted = {one.partition(".")[::2] for one in CODE if re.fullmatch(r"(open|replace|limits)\.\w+", one)}
    for kind, field in dotted:
        owner = LimitsConfig.model_fields if kind == "limits" else messages.FILE.message_types_by_name[kind.capitalize()].fields_by_name
        assert field in owner, f"{kind}.{field}"


def test_every_limit_is_named() -> None:
    told = {one.removeprefix("limits.") for one in CODE}
    assert not set(LimitsConfig.model_fields) - told


def test_every_status_is_explained() -> None:
    table = TEXT.split("| status |")[1].split("\n\n")[0]
    rows = {name for row in table.splitlines()[2:] for name in row.split("|")[1].replace(" ", "").split(",")}
    assert rows == {status.name for status in Status if status not in NOT_OVER_GRPC}
