"""What a run is made of, by content: a run that is resumed must be made of the same, wherever that is now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cvmk.errors import DataError
from cvmk.report.names import CONTENTS
from cvmk.text.corpus import ParallelCorpus


@dataclass(frozen=True)
class Content:
    """Something that a run reads: where it is, the sha256 of what is there, and how many sentences that are where it is text.

    `settled` is False for a teacher that was still in training: it may be another one by the time that the run goes on.
    """

    name: str
    sha256: str
    sentences: int | None = None
    settled: bool = True


def contents_of(corpora: Iterable[ParallelCorpus | None]) -> dict[str, Content]:
    """The contents of corpora, by the key of the configuration and the side: "data.train.source"."""
    found = {}
    for corpus in corpora:
        if corpus is not None:
            origins = (corpus.origin or corpus.name, corpus.target_origin or corpus.origin or corpus.name)
            for side, origin, fingerprint in zip(("source", "target"), origins, corpus.fingerprints, strict=True):
                found[f"{corpus.name}.{side}"] = Content(origin, fingerprint, len(corpus))
    return found


def to_json(contents: Mapping[str, Content]) -> dict[str, Any]:
    return {key: asdict(content) for key, content in contents.items()}


def check_contents(folder: Path, before: Any, now: Mapping[str, Content]) -> None:
    """Raise DataError, naming every file, where what the run in `folder` was made of (as `to_json` gave it) is not what it would be made of now."""
    try:
        then = {key: Content(**value) for key, value in before.items()}
    except (AttributeError, TypeError) as error:
        raise DataError(f"{folder / CONTENTS} is corrupt ({error}): restore it, or --restart") from error
    changes = []
    for key in {**then, **now}:
        old, new = then.get(key), now.get(key)
        if old is not None and new is not None:
            if old.sha256 != new.sha256 and old.settled:
                changes.append(f"{new.name} has another content{_count(old, new)}")
        elif (alone := old or new) is not None:
            changes.append(f"{alone.name} ({key.removesuffix('.source').removesuffix('.target')}) {'was not' if old is None else 'was'} part of it")
    if changes:
        raise DataError(
            f"the run in {folder} was made of other things: {'; '.join(dict.fromkeys(changes))}; restore what has changed, or --restart to begin anew"
        )


def _count(old: Content, new: Content) -> str:
    return f" ({old.sentences} usable sentences then, {new.sentences} now)" if old.sentences != new.sentences else ""
