"""What clients do to a server, measured at their side: paced speech, requests in a closed or an open loop, slow readers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from cvmk.serving import messages

WORDS_A_MINUTE = 150.0
_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
_STREAMS = 16  # of one connection


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that so much of them is no larger than; nan where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def metadata(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),) if key else ()


@contextlib.asynccontextmanager
async def channels(address: str, streams: int) -> AsyncIterator[list[grpc.aio.Channel]]:
    """Connections for so many streams."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(grpc.aio.insecure_channel(address, _OPTIONS)) for _ in range(-(-streams // _STREAMS))]


def bytes_of(message: Any) -> bytes:
    return bytes(message.SerializeToString())


async def translate(channel: grpc.aio.Channel, texts: Sequence[str], key: str = "", timeout: float | None = None) -> Any:
    call = channel.unary_unary(f"/{messages.SERVICE}/Translate", request_serializer=bytes_of, response_deserializer=messages.TranslateResponse.FromString)
    return await call(messages.TranslateRequest(texts=[text.encode() for text in texts], source="en"), metadata=metadata(key), timeout=timeout)


@dataclass
class Spoken:
    """What a stream's client saw: seconds from a word to the first text that takes it into account; how many words had been sent and were not taken into
    account when text came, and for how many seconds the first of them had been sent."""

    seconds: list[float] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)
    words: int = 0


class Speaker:
    """A live stream: words at a pace, end of sentence where the text has one. Words whose translation says the same as before get no response, and no time."""

    def __init__(self, channel: grpc.aio.Channel, sentences: Sequence[str], pace: float = WORDS_A_MINUTE, slow: float = 0.0, key: str = "") -> None:
        self._sentences, self._pace, self._slow = sentences, pace, slow
        path = f"/{messages.SERVICE}/TranslateStream"
        call = channel.stream_stream(path, request_serializer=bytes_of, response_deserializer=messages.StreamResponse.FromString)
        self._call, self._writing = call(metadata=metadata(key)), asyncio.Lock()
        self._sent: dict[int, float] = {}
        self._closed = False
        self.found = Spoken()

    async def open(self) -> None:
        policy = messages.Policy(retranslation=messages.Retranslation(mask=0))
        await self._send(open=messages.Open(source="en", policy=policy))
        assert (await self._call.read()).opened.session

    async def speak(self, seconds: float, ignored: float = 0.5) -> Spoken:
        """Go on for so many seconds; the first `ignored` do not count."""
        generator = random.Random(id(self))
        await asyncio.sleep(generator.random() * 60 / self._pace)
        begun = time.monotonic()
        reading = asyncio.create_task(self._read(begun + ignored))
        seq, due = 0, time.monotonic()
        while time.monotonic() - begun < seconds:
            for word in generator.choice(self._sentences).split():
                if time.monotonic() - begun > seconds:
                    break
                due += 60 / self._pace
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                seq += 1
                self._sent[seq] = time.monotonic()
                await self._send(append=messages.Append(seq=seq, text=f"{word} ".encode()))
            await self._send(end_segment=messages.EndSegment())
        self.found.words, self._closed = seq, True
        await self._send(close=messages.Close())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reading, 10 + 60 * self._slow)
        self._call.cancel()
        return self.found

    async def _read(self, counting: float) -> None:
        answered = set[int]()
        while (response := await self._call.read()) is not grpc.aio.EOF:
            now, seq = time.monotonic(), response.seq_read
            if now > counting:
                self.found.ages.append(now - self._sent.get(seq + 1, now))
                self.found.behind.append(len(self._sent) - seq)
                if seq in self._sent and seq not in answered and not response.final:
                    self.found.seconds.append(now - self._sent[seq])
            answered.add(seq)  # the first response counts
            if self._slow:
                await asyncio.sleep(self._slow)
            if self._closed:  # a write to a call that has ended would hide how
                continue
            await self._send(response.revision)

    async def _send(self, acknowledged: int = 0, **event: Any) -> None:
        async with self._writing:
            try:
                await self._call.write(messages.StreamRequest(ack_revision=acknowledged, **event))
            except asyncio.InvalidStateError:  # the call has ended: say how
                code = await self._call.code()
                raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=await self._call.details()) from None


async def live(address: str, sentences: Sequence[str], streams: int, seconds: float, pace: float = WORDS_A_MINUTE, slow: int = 0, key: str = "") -> Any:
    """Speakers at once; what those that read at once saw, and what the `slow` others did, who read one message a second."""
    async with channels(address, streams) as those:
        speakers = [Speaker(those[i % len(those)], sentences, pace, 1.0 if i < slow else 0.0, key) for i in range(streams)]
        for speaker in speakers:
            await speaker.open()
        found = await asyncio.gather(*(speaker.speak(seconds) for speaker in speakers))
    return joined(found[slow:]), joined(found[:slow])


def joined(found: Sequence[Spoken]) -> Spoken:
    return Spoken(
        [one for each in found for one in each.seconds], [one for each in found for one in each.behind],
        [one for each in found for one in each.ages], sum(each.words for each in found),
    )  # fmt: skip


async def closed_loop(address: str, sentences: Sequence[str], clients: int, seconds: float, pause: float = 0.0, key: str = "") -> tuple[float, list[float]]:
    """Clients that ask again when they have been answered: sentences a second, and each answer's seconds."""
    times: list[float] = []
    async with channels(address, clients) as those:
        await translate(those[0], sentences[:4], key)
        until = time.monotonic() + seconds

        async def one(index: int) -> None:
            generator = random.Random(index)
            while time.monotonic() < until:
                begun = time.monotonic()
                await translate(those[index % len(those)], [generator.choice(sentences)], key)
                times.append(time.monotonic() - begun)
                if pause:
                    await asyncio.sleep(pause)

        begun = time.monotonic()
        await asyncio.gather(*(one(index) for index in range(clients)))
        return len(times) / (time.monotonic() - begun), times


@dataclass
class Flood:
    """What came of requests that came whether others had been answered or not."""

    offered: float = 0.0
    goodput: float = 0.0
    answered: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


async def open_loop(address: str, sentences: Sequence[str], rate: float, seconds: float, generator: random.Random, key: str = "", together: int = 1) -> Flood:
    """Requests as a Poisson process, so many sentences a second, each request with some; answers of the second half count for the goodput, so that the queue
    has filled. More than one a request lets a client that is a Python process itself ask for more than a server can do."""
    found, tasks, done = Flood(), set[asyncio.Task[None]](), list[float]()
    async with channels(address, 64) as those:
        await asyncio.gather(*(channel.channel_ready() for channel in those))

        async def one(texts: Sequence[str], channel: grpc.aio.Channel) -> None:
            begun = time.monotonic()
            try:
                await translate(channel, texts, key)
                found.answered.append(time.monotonic() - begun)
                done.append(time.monotonic())
            except grpc.aio.AioRpcError as error:
                code = error.code().name
                found.rejected.append(time.monotonic() - begun) if code == "RESOURCE_EXHAUSTED" else found.others.update([code])

        begun = due = time.monotonic()
        count = 0
        while (now := time.monotonic()) - begun < seconds:
            due += generator.expovariate(rate / together)
            if due > now:
                await asyncio.sleep(due - now)
            elif count % 20 == 0:
                await asyncio.sleep(0)  # it is behind, and yet answers have to be read
            task = asyncio.create_task(one(generator.choices(sentences, k=together), those[count % len(those)]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            count += 1
        ended = time.monotonic()
        found.offered = together * count / (ended - begun)
        middle = begun + (ended - begun) / 2
        found.goodput = together * sum(middle <= at < ended for at in done) / (ended - middle)
        await asyncio.gather(*tasks, return_exceptions=True)  # what was taken is answered: to cancel thousands at once is another test
    return found
