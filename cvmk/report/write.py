"""Where a report is written, and writing it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cvmk.errors import ConfigError
from cvmk.files import write_bytes
from cvmk.report.figures import Figures

SUFFIXES = (".html", ".md", ".json")


def outputs(out: str | os.PathLike[str]) -> list[Path]:
    """The files that a report is written to: `out` with each ending. Raises ConfigError for an ending of something else and for a folder's name."""
    path = Path(out)
    if path.suffix in SUFFIXES:
        path = path.with_suffix("")
    elif path.suffix in (".pdf", ".htm", ".txt", ".docx"):
        raise ConfigError(f"{out}: a report is written as .html, .md and .json; name it without an ending (a browser prints the page as PDF)")
    if not path.name or path.is_dir():
        raise ConfigError(f"{out} is a folder: name the report in it, such as {path / 'report'}")
    return [path.with_name(path.name + suffix) for suffix in SUFFIXES]


def write_report(figures: Figures, out: str | os.PathLike[str]) -> list[Path]:
    """Write page, Markdown and JSON, each whole or not at all, and only when all are made. Returns their paths, the page's first."""
    from cvmk.report.contents import document
    from cvmk.report.html import html
    from cvmk.report.markdown import markdown

    paths, content = outputs(out), document(figures)
    texts = [html(content), markdown(content), json.dumps(figures.to_json(), ensure_ascii=False, indent=1) + "\n"]
    for path, text in zip(paths, texts, strict=True):
        write_bytes(path, text.encode("utf-8", "backslashreplace"))
    return paths
