"""A translation does not depend on what is translated beside it, to the last bit of its score."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from served import ask, serving

from cvmk.serving import messages

WORDS = "a man rides two horses horse ride the big small red and of x y".split()


async def translated(channel: Any, texts: list[str], **options: Any) -> list[tuple[str, float]]:
    found = await ask(channel, "Translate", messages.TranslateRequest(texts=[text.encode() for text in texts], source="en", **options))
    return [(one.text.decode(), one.score) for one in found.translations]


@pytest.mark.parametrize(("count", "rounds"), [(60, 3), pytest.param(500, 20, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("threads", [1, 2])
def test_company_changes_nothing(serve_config: Any, threads: int, count: int, rounds: int) -> None:
    generator = random.Random(count)
    sentences = [" ".join(generator.choice(WORDS) for _ in range(generator.randint(1, 12))) for _ in range(count)]
    config = serve_config(each={"threads": threads, "running_tokens": 256}, limits={"waiting_tokens_per_client": 60_000})

    async def together(channel: Any, texts: list[str]) -> None:
        """In requests of random sizes that come at random times, among others that ask otherwise."""
        order = generator.sample(range(len(texts)), len(texts))
        found: dict[int, tuple[str, float]] = {}

        async def one(places: list[int], pause: float, beam: int) -> None:
            await asyncio.sleep(pause)
            answers = await translated(channel, [texts[place] for place in places], beam_size=beam)
            if beam == 1:
                found.update(zip(places, answers, strict=True))

        calls = []
        while order:
            places = [order.pop() for _ in range(min(generator.choice((1, 1, 2, 7, 30)), len(order)))]
            calls.append(one(places, generator.random() * 0.02, 1))
            if generator.random() < 0.3:
                calls.append(one(places[:3], generator.random() * 0.02, generator.choice((2, 3))))
        await asyncio.gather(*calls)
        assert [found[place] for place in range(len(texts))] == alone

    async def go() -> None:
        nonlocal alone
        async with serving(config) as (_, channel):
            alone = [(await translated(channel, [text], beam_size=1))[0] for text in sentences]
            for _ in range(rounds):
                await together(channel, sentences)

    alone: list[tuple[str, float]] = []
    asyncio.run(asyncio.wait_for(go(), 1000))
    assert len({text for text, _ in alone}) > 20
