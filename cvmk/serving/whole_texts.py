"""Texts and HTML documents in known and unknown languages, as one request has them, through an application that translates texts of one language."""

from __future__ import annotations

import asyncio
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cvmk.serving.auth import Caller
from cvmk.serving.detection import AUTO, found_for_each, tag_of
from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.html import Document
from cvmk.serving.models import answers
from cvmk.streaming import Sentences

if TYPE_CHECKING:
    from cvmk.serving.application import Application


class Source(NamedTuple):
    """The language of a text, and how sure that is, from 0 to 1."""

    code: str
    probability: float


@dataclass(frozen=True)
class WholeText:
    """A translated text. Alternatives are different from it and from each other."""

    text: str
    alternatives: list[str]
    source: Source


async def translate_whole(
    application: Application, caller: Caller, texts: Sequence[str], *, source: str, target: str, is_html: bool = False, alternatives: int = 0
) -> list[WholeText]:
    """Translations of texts in a source language, or each in its own ("auto"), all at once. A text that is in the target language already stays as it is.
    Raises ServiceError."""
    with application.admitted():  # a document may need another round, for what its elements say
        return await _translated(application, caller, texts, source, tag_of("target", target), is_html, alternatives)


async def _translated(
    application: Application, caller: Caller, texts: Sequence[str], source: str, target: str, is_html: bool, alternatives: int
) -> list[WholeText]:
    plain = await asyncio.to_thread(lambda: [Document(text).text for text in texts]) if is_html and source == AUTO else texts
    sources = _sources(application, plain, target) if source == AUTO else [Source(_served(application, source), 1.0)] * len(texts)
    places: dict[str, list[int]] = {}
    for place, found in enumerate(sources):
        places.setdefault(found.code, []).append(place)
    translate = _documents if is_html else _texts
    said = [[text] for text in texts]
    tasks = {
        code: asyncio.ensure_future(translate(application, caller, [texts[place] for place in those], code, target, alternatives))
        for code, those in places.items()
        if not answers(target, code)
    }
    try:
        for code, task in tasks.items():
            for place, candidates in zip(places[code], await task, strict=True):
                said[place] = list(dict.fromkeys(candidates))
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    return [WholeText(candidates[0], candidates[1:], found) for candidates, found in zip(said, sources, strict=True)]


async def _texts(application: Application, caller: Caller, texts: Sequence[str], source: str, target: str, alternatives: int) -> list[list[str]]:
    found = await application.translate(caller, texts, source=source, target=target, alternatives=alternatives)
    return [[one.text, *one.alternatives] for one in found]


async def _documents(application: Application, caller: Caller, texts: Sequence[str], source: str, target: str, alternatives: int) -> list[list[str]]:
    """HTML: every text that documents want is translated once. An alternative of a document has those of its texts, of the same rank."""
    best: dict[str, str] = {}
    known = [best, *(ChainMap[str, str]({}, best) for _ in range(alternatives))]
    documents = await asyncio.to_thread(_parsed, texts, source)
    while wanted := await asyncio.to_thread(_wanted, documents, known):
        for text, found in zip(wanted, await application.translate(caller, wanted, source=source, target=target, alternatives=alternatives), strict=True):
            best[text] = found.text
            for ranked, other in zip(known[1:], found.alternatives, strict=False):
                ranked[text] = other
    return await asyncio.to_thread(lambda: [[document.render(ranked) for ranked in known] for document in documents])


def _parsed(texts: Sequence[str], source: str) -> list[Document]:
    return [Document(text, Sentences(source.partition("-")[0])) for text in texts]


def _wanted(documents: Sequence[Document], known: Sequence[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(text for document in documents for ranked in known for text in document.wanted(ranked)))


def _sources(application: Application, texts: Sequence[str], target: str) -> list[Source]:
    """The language of each text, among those that can be translated to the target, and the target itself."""
    able = [language.code for language in application.languages() if any(answers(target, served) for served in language.targets)]
    if not able:
        raise ServiceError(Status.NOT_FOUND, f"target {target!r} is no language that is translated to: /languages has those", field="target")

    def source(text: str) -> Source:
        ranked = (Source(language.code, language.probability) for language in application.detect(text))
        return next((found for found in ranked if found.code in able or answers(target, found.code)), Source(able[0], 0.0))

    return found_for_each(texts, source)


def _served(application: Application, source: str) -> str:
    """The served language that answers to this one. Somebody can translate from it or to it: a text may be in the target language already."""
    tag = tag_of("source", source)
    codes = dict.fromkeys(code for language in application.languages() for code in (language.code, *language.targets))
    if (found := next((code for code in (tag, *codes) if code in codes and answers(tag, code)), None)) is None:
        raise ServiceError(Status.NOT_FOUND, f"source {source!r} is no language that is served: /languages has those", field="source")
    return found
