"""Tasks that end together, and work in pieces between which the event loop turns to others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")
_AT_ONCE = 4
"""Tasks that begin before the event loop turns to others."""


async def together(function: Callable[..., Coroutine[Any, Any, _T]], arguments: Sequence[Sequence[Any]]) -> list[_T]:
    """What a function gives for each of the arguments, at the same time; the first error of one of them ends the others, and is raised by itself."""
    if len(arguments) == 1:  # without the cost of a task
        return [await function(*arguments[0])]
    tasks = []
    try:
        async with asyncio.TaskGroup() as group:
            async for one in in_pieces(arguments, _AT_ONCE):
                tasks.append(group.create_task(function(*one)))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def in_pieces(items: Iterable[_T], size: int) -> AsyncIterator[_T]:
    """The items; the event loop turns to others behind so many of them."""
    for index, item in enumerate(items):
        if index % size == 0 and index:
            await asyncio.sleep(0)
        yield item
