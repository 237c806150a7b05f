"""Coroutines that translate: together, cancelled, late, with partial translations, behind a closed translator."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cvmk.errors import ConfigError, DataError
from cvmk.inference import AsyncTranslator, ExpiredError, Finished, Hypothesis, Partial, Request, Translator

KINDS = pytest.mark.parametrize("of", [Translator.from_model, Translator.of_weights], ids=["torch", "native"])


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@KINDS
def test_many_at_a_time(make_model, tokenizer, of: Any) -> None:
    translator = of(make_model(tokenizer.vocab_size, sharpness=3.0), tokenizer)
    texts = [f"w{4 + index} w{5 + index % 3}" for index in range(12)]
    expected = [translator.translate([text], beam_size=1 + index % 3)[0].text for index, text in enumerate(texts)]

    async def all_of_them() -> list[str]:
        async with AsyncTranslator(translator) as one:
            return [found.text for found in await asyncio.gather(*(one.translate(text, beam_size=1 + index % 3) for index, text in enumerate(texts)))]

    assert run(all_of_them()) == expected


@KINDS
def test_partial_cancelled_late_and_wrong(make_model, tokenizer, of: Any) -> None:
    translator = of(make_model(tokenizer.vocab_size, sharpness=3.0), tokenizer)
    begun = tokenizer.encode("ab")

    async def go() -> None:
        said: list[str] = []
        async with AsyncTranslator(translator) as one:
            found = await one.translate("w4 w5", on_partial=said.append, prefix="ab")
            await asyncio.sleep(0)
            assert said and all(a != b for a, b in zip(said, said[1:], strict=False)) and found.tokens[: len(begun)] == begun
            assert (await one.translate("  ")).text == ""
            with pytest.raises(ExpiredError):
                await one.translate("w4 w5", timeout=1e-9, min_length=30)
            with pytest.raises(ConfigError):
                await one.translate("w4", beam_size=0)
            with pytest.raises(DataError):
                await one.translate("w4 " * 100)
            task = asyncio.create_task(one.translate("w4", min_length=30))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await one.translate("w4 w5", prefix="ab")).text == found.text
        with pytest.raises(RuntimeError, match="closed"):
            await one.translate("w4")

    run(go())


def test_who_waits_when_it_closes_is_cancelled(make_model, tokenizer) -> None:
    translator = Translator.of_weights(make_model(tokenizer.vocab_size), tokenizer)

    async def go() -> None:
        async with AsyncTranslator(translator) as one:
            tasks = [asyncio.create_task(one.translate("w4 w5", min_length=35, beam_size=50)) for _ in range(20)]
            await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) or result.text is not None for result in results)

    run(go())
    assert translator.engine.step() == []


def test_a_failing_step_is_told_to_those_who_wait(make_model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    translator = Translator.from_model(make_model(tokenizer.vocab_size), tokenizer)

    async def go() -> None:
        async with AsyncTranslator(translator) as one:
            with monkeypatch.context() as patch:
                patch.setattr(type(translator.engine.model), "step", lambda *arguments: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    await one.translate("w4")
            assert await one.translate("w4") is not None

    run(go())


def test_what_a_failed_step_was_working_on_begins_anew(make_model, tokenizer) -> None:
    """With what was left of its time, one after the other; what fails again fails alone, and whoever comes meanwhile waits."""
    translator = Translator.of_weights(make_model(tokenizer.vocab_size, sharpness=3.0), tokenizer)
    texts = [f"w{4 + index} w{5 + index % 3}" for index in range(6)]
    expected = [one.text for one in translator.translate(texts)]
    engine: Any = translator.engine
    poison, step = translator.encode("poison"), engine.step

    def failing() -> Any:
        if any(list(one.source) == poison for one in list(engine._requests.values())):
            raise ZeroDivisionError
        return step()

    async def go() -> None:
        engine.step = failing
        async with AsyncTranslator(translator) as one:
            good = [asyncio.create_task(one.translate(text)) for text in texts]
            bad = [asyncio.create_task(one.translate("poison")) for _ in range(2)]
            late, cancelled = asyncio.create_task(one.translate("w4", timeout=1e-9)), asyncio.create_task(one.translate("w4"))
            await asyncio.sleep(0.001)
            cancelled.cancel()
            good += [asyncio.create_task(one.translate(text)) for text in texts]
            with pytest.raises(ExpiredError):
                await late
            for task in bad:
                with pytest.raises(ZeroDivisionError):
                    await task
            assert [(await task).text for task in good] == expected * 2
            await asyncio.wait({cancelled})
            with pytest.raises(ConfigError):
                await one.translate("w4", beam_size=0)

    run(go())
    assert not engine._requests


def test_a_step_that_changes_nothing_is_not_told(tokenizer) -> None:
    """A beam may say the same again."""

    class Stutters:
        max_length = 40

        def __init__(self) -> None:
            self.left = [["a"], ["a"], ["a", "b"], ["a", "b"]]

        def submit(self, request: Request) -> None:
            self.id = request.id

        def step(self) -> list[Any]:
            if self.left:
                return [Partial(self.id, tokenizer.encode("".join(self.left.pop(0))))]
            return [Finished(self.id, [Hypothesis(tokenizer.encode("ab"))])]

        def cancel(self, id: Any) -> bool:
            return False

    async def go() -> list[str]:
        said: list[str] = []
        async with AsyncTranslator(Translator.from_engine(Stutters(), tokenizer)) as one:
            await one.translate("w4", on_partial=said.append)
        return said

    assert run(go()) == ["a", "ab"]
