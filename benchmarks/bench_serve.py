"""A live server under load, measured from outside: `python benchmarks/bench_serve.py MODEL --text FILE [--seconds S] [--only NAME] [--results FILE]`.

Starts `cvmk serve` in a process of its own (int8, one thread of the engine beside that of the event loop), asks of it what users and their mistakes do, from
this process at low priority, and prints what was found beside what is asked for. C is what a closed loop of 16 clients reaches. --text has sentences, one a
line. Figures mean something only where nothing else runs; each takes a few times --seconds. `--soak SECONDS` does everything at once for so long.
Exit code 1 where something that was asked for was not reached.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from cheap_flood import OK, REFUSED_BY_CORE, RESOURCE_EXHAUSTED, flood
from serve_load import Flood, Speaker, bytes_of, channels, closed_loop, live, metadata, open_loop, percentile, translate
from server_process import ServerProcess, free_port

from cvmk.files import read_text
from cvmk.serving import messages

LIVE, CLIENTS = 16, 16
TOGETHER = 16
"""Sentences of a request of a flood."""
_STARTER = ThreadPoolExecutor(1)
"""Starts servers. Priorities are of threads on Linux, and inherited."""
KEYS = ("a-token-of-somebody-who-speaks", "a-token-of-somebody-with-much-text", "a-token-of-the-administrator")
_MANY = {"sessions": 2000, "sessions_per_client": 2000}


@dataclass
class Row:
    """A figure, what was asked for, and whether that was reached (None: nothing was)."""

    figure: str
    value: float
    unit: str
    asked: str = ""
    reached: bool | None = None


def at_most(figure: str, value: float, limit: float, unit: str) -> Row:
    return Row(figure, value, unit, f"<= {limit:g}", value <= limit)


def at_least(figure: str, value: float, limit: float, unit: str) -> Row:
    return Row(figure, value, unit, f">= {limit:g}", value >= limit)


class Bench:
    """The model, the text, how long, and servers of them."""

    def __init__(self, model: str, sentences: Sequence[str], seconds: float, options: dict[str, Any]) -> None:
        self.model, self.sentences, self.seconds, self._options = str(Path(model).resolve()), sentences, seconds, options
        self.generator = random.Random(0)
        self._capacity = 0.0

    @contextlib.contextmanager
    def server(self, limits: dict[str, int] | None = None, tls: tuple[str, str] | None = None, before: str = "", **server: Any) -> Iterator[ServerProcess]:
        """`tls` are the files of a certificate that signs itself, and of its key; `before` as ServerProcess has it."""
        with tempfile.TemporaryDirectory() as folder:
            for index, name in enumerate(("clients", "admin")):
                path = Path(folder, name)
                path.write_text("".join(f"client{number} = {key}\n" for number, key in enumerate(KEYS[:2] if index == 0 else KEYS[2:])))
                path.chmod(0o600)
            model = {"path": self.model, "threads": 1, "source": "en", "target": "de", **self._options}
            security = {"keys": f"{folder}/clients", "admin_keys": f"{folder}/admin"}
            security |= {"certificate": tls[0], "private_key": tls[1]} if tls else {}
            tables = {"models": {"en-de": model}, "limits": {**_MANY, **(limits or {})}, "security": security, "server": {**server, "port": free_port()}}
            before = f"from soak import without_huge_pages\nwithout_huge_pages()\n{before}"
            one = ServerProcess(tables, before, Path(tls[0]).read_bytes() if tls else None)
            try:
                _STARTER.submit(one.start).result()
                yield one
            finally:
                one.__exit__()

    async def capacity(self, address: str) -> float:
        """C, measured once."""
        if not self._capacity:
            await closed_loop(address, self.sentences, CLIENTS, 0.5, key=KEYS[0])
            self._capacity, _ = await closed_loop(address, self.sentences, CLIENTS, self.seconds, key=KEYS[0])
        return self._capacity


async def latency(bench: Bench) -> list[Row]:
    """Speech, the more streams the slower."""
    rows = []
    with bench.server() as server:
        for streams in (1, LIVE):
            await live(server.address, bench.sentences, streams, 1.0, key=KEYS[0])
            found, _ = await live(server.address, bench.sentences, streams, bench.seconds + 1, key=KEYS[0])
            p50, p99 = (1000 * percentile(found.seconds, share) for share in (0.5, 0.99))
            name = f"first text after a word, {streams} live stream{'s' if streams > 1 else ''}"
            asked = streams == LIVE
            rows += [at_most(f"{name}, p50", p50, 15, "ms") if asked else Row(f"{name}, p50", p50, "ms")]
            rows += [at_most(f"{name}, p99", p99, 60, "ms") if asked else Row(f"{name}, p99", p99, "ms")]
            rows += [Row(f"words behind at 150 a minute, {streams} streams, p99", percentile(found.behind, 0.99), "words")]
    return rows


async def solo(bench: Bench) -> list[Row]:
    with bench.server() as server:
        _, times = await closed_loop(server.address, bench.sentences, 1, bench.seconds, key=KEYS[0])
        return [Row(f"a sentence alone, p{share}", 1000 * percentile(times, share / 100), "ms") for share in (50, 99)]


async def overload(bench: Bench) -> list[Row]:
    rows = []
    with bench.server() as server:
        capacity = await bench.capacity(server.address)
        rows.append(Row(f"C: a closed loop of {CLIENTS} clients", capacity, "sentences/s"))
        for factor in (2, 4, 10):
            found: Flood = await open_loop(server.address, bench.sentences, factor * capacity, bench.seconds, bench.generator, KEYS[0], TOGETHER)
            name = f"overload {factor} C (offered {found.offered / capacity:.1f} C)"
            rows.append(at_least(f"{name}: goodput", found.goodput / capacity, 0.9, "C"))
            if found.rejected:
                rows.append(at_most(f"{name}: time of a rejection, p50", 1000 * percentile(found.rejected, 0.5), 20, "ms"))
                rows.append(Row(f"{name}: time of a rejection, p99", 1000 * percentile(found.rejected, 0.99), "ms"))
            rows.append(at_most(f"{name}: other errors {dict(found.others) or ''}", sum(found.others.values()), 0, ""))
        _, times = await closed_loop(server.address, bench.sentences, 1, 1.0, key=KEYS[0])
        rows.append(Row("a sentence alone right after it, p99", 1000 * percentile(times, 0.99), "ms"))
    return rows


async def calls(bench: Bench) -> list[Row]:
    """Overload by calls of one sentence, of a client that leaves the processors to the server; its process and the server's threads are looked at, too."""
    rows, method = [], f"/{messages.SERVICE}/Translate"
    requests = [bytes_of(messages.TranslateRequest(texts=[sentence.encode()], source="en")) for sentence in bench.sentences]
    with bench.server({"sessions": 64, "sessions_per_client": 16}) as server:  # as they are by default
        capacity = await bench.capacity(server.address)
        rows.append(Row(f"C: a closed loop of {CLIENTS} clients", capacity, "sentences/s"))
        for factor in (2, 4, 10):
            of_server, of_client = server.cpu_seconds(), time.process_time()
            found = await asyncio.to_thread(flood, server.address, method, requests, factor * capacity, bench.seconds, bench.generator, KEYS[0], CLIENTS)
            of_server, of_client = server.cpu_seconds() - of_server, time.process_time() - of_client
            refused = [seconds for status in (RESOURCE_EXHAUSTED, REFUSED_BY_CORE) for seconds in found.seconds(status)]
            name = f"calls of a sentence, {factor} C"
            rows.append(at_least(f"{name}: goodput", found.rate(OK) / capacity, 0.9, "C"))
            rows.append(Row(f"{name}: an answer, p99", 1000 * percentile(found.seconds(OK), 0.99), "ms"))
            if refused:
                rows.append(at_most(f"{name}: a refusal, p99", 1000 * percentile(refused, 0.99), 20, "ms"))
                rows.append(Row(f"{name}: refusals in words (RESOURCE_EXHAUSTED)", len(found.seconds(RESOURCE_EXHAUSTED)) / len(refused), "of all"))
            others = found.calls - found.kept - len(found.seconds(OK)) - len(refused)
            rows.append(at_most(f"{name}: other ends, or none", others, 0, "calls"))
            rows.append(Row(f"{name}: the server's processor time for an answer", 1e6 * of_server / len(found.seconds(OK)), "us"))
            rows.append(Row(f"{name}: processor time of the client", of_client / (of_client + of_server), "of all"))
    return rows


async def slow_readers(bench: Bench) -> list[Row]:
    half = LIVE // 2
    with bench.server() as server:
        await live(server.address, bench.sentences, half, 1.0, 600, key=KEYS[0])
        alone, _ = await live(server.address, bench.sentences, half, bench.seconds + 1, 600, key=KEYS[0])
        quick, _ = await live(server.address, bench.sentences, LIVE, bench.seconds + 1, 600, key=KEYS[0])
        others, slow = await live(server.address, bench.sentences, LIVE, bench.seconds + 2, 600, slow=half, key=KEYS[0])
    p99, before, all_quick = (1000 * percentile(found.seconds, 0.99) for found in (others, alone, quick))
    return [
        Row("slow readers, a message a second: age of what they read, p50", percentile(slow.ages, 0.5), "s"),
        Row("slow readers, a message a second: age of what they read, most", max(slow.ages, default=0.0), "s"),
        Row("8 streams at 10 words a second alone, p99", before, "ms"),
        Row("16 streams at 10 words a second, all quick, p99", all_quick, "ms"),
        at_most("8 streams beside 8 slow readers, p99 over alone", p99 / before, 1.2, ""),
        at_most("8 streams beside 8 slow readers, p99 over beside 8 quick ones", p99 / all_quick, 1.2, ""),
    ]


async def fairness(bench: Bench) -> list[Row]:
    much = {"texts": 40_000, "message_bytes": 8 << 20, "waiting_tokens": 2_000_000, "waiting_tokens_per_client": 1_000_000}
    with bench.server(much) as server:
        _, alone = await closed_loop(server.address, bench.sentences, 8, bench.seconds, 0.05, KEYS[0])
        async with channels(server.address, 1) as (channel,):
            texts = [bench.sentences[index % len(bench.sentences)] for index in range(40_000)]
            queued = asyncio.ensure_future(translate(channel, texts, KEYS[1], 3600))
            await asyncio.sleep(1.0)
            _, beside = await closed_loop(server.address, bench.sentences, 8, bench.seconds, 0.05, KEYS[0])
            assert not queued.done(), queued.exception() or 'all was translated before the end: take fewer --seconds'
            queued.cancel()
            await asyncio.wait({queued})
    p99 = 1000 * percentile(alone, 0.99), 1000 * percentile(beside, 0.99)
    return [
        Row("8 interactive clients alone, p99", p99[0], "ms"), Row("8 interactive clients beside 40,000 queued sentences, p99", p99[1], "ms"),
        at_most("their p99 over alone", p99[1] / p99[0], 2, ""),
    ]  # fmt: skip


async def memory(bench: Bench) -> list[Row]:
    with bench.server() as server:
        await live(server.address, bench.sentences, LIVE, 1.0, key=KEYS[0])
        async with channels(server.address, 1000) as those:
            before = server.own_bytes()
            speakers = [Speaker(those[index % len(those)], bench.sentences, key=KEYS[0]) for index in range(1000)]
            for speaker in speakers:
                await speaker.open()
            return [Row("memory of an open stream, its connection counted", (server.own_bytes() - before) / 1000 / 1024, "KiB")]


async def scraping(bench: Bench) -> list[Row]:
    port = free_port()

    def scrape() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return sum(not line.startswith(b"#") for line in answer.read().splitlines())

    async def ten_a_second() -> None:
        while True:
            await asyncio.to_thread(scrape)
            await asyncio.sleep(0.1)

    without, during = list[float](), list[float]()  # in turn, at ten words a second of each stream: of fewer words p99 is the second or third worst of all
    with bench.server(metrics_port=port) as server:
        await live(server.address, bench.sentences, LIVE, 1.0, 600, key=KEYS[0])
        for _ in range(4):
            without += (await live(server.address, bench.sentences, LIVE, bench.seconds / 2 + 0.5, 600, key=KEYS[0]))[0].seconds
            task = asyncio.create_task(ten_a_second())
            during += (await live(server.address, bench.sentences, LIVE, bench.seconds / 2 + 0.5, 600, key=KEYS[0]))[0].seconds
            task.cancel()
            await asyncio.wait({task})
        ratios = [percentile(during, share) / percentile(without, share) for share in (0.5, 0.99)]
        return [
            Row("metrics read at 10 Hz: p50 over without", ratios[0], ""), at_most("metrics read at 10 Hz: p99 over without", ratios[1], 1.02, ""),
            at_most("series of metrics", float(scrape()), 200, ""),
        ]  # fmt: skip


async def handshakes(bench: Bench) -> list[Row]:
    """TLS connections that do nothing but begin, and how late the event loop comes to what is due meanwhile: looked at 100 times a second."""
    often = "from cvmk.serving.metrics import Metrics\nMetrics.watch_loop.__defaults__ = (0.01,)"
    port, limit = free_port(), "0.05"
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = f"{folder}/certificate", f"{folder}/key"
        made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
        names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", certificate]
        subprocess.run([*made, *names], check=True, capture_output=True)
        trusting = ssl.create_default_context(cafile=certificate)
        trusting.set_alpn_protocols(["h2"])

        def late() -> tuple[float, float, float]:
            """Looks so far, those that were later than the limit, and seconds late altogether."""
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                told = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line.startswith("cvmk_event_loop_lag"))
            looks, in_time, total = (float(told[f"cvmk_event_loop_lag_seconds{name}"]) for name in ("_count", f'_bucket{{le="{limit}"}}', "_sum"))
            return looks, looks - in_time, total

        def shake(address: tuple[str, int], rate: float, until: float) -> int:
            count, due = 0, time.monotonic()
            while due < until:
                time.sleep(max(0.0, due - time.monotonic()))
                with socket.create_connection(address) as plain, trusting.wrap_socket(plain, server_hostname="localhost"):
                    count += 1
                due = max(due + 1 / rate, time.monotonic() - 0.1)
            return count

        with bench.server(tls=(certificate, key), before=often, metrics_port=port) as server:
            await asyncio.sleep(0.5)
            found, begun, address = late(), time.monotonic(), ("127.0.0.1", server.tables["server"]["port"])
            counts = await asyncio.gather(*(asyncio.to_thread(shake, address, 250.0, begun + bench.seconds) for _ in range(4)))
            passed = time.monotonic() - begun
            looks, over, seconds = (after - before for before, after in zip(found, late(), strict=True))
            return [
                Row("TLS handshakes", sum(counts) / passed, "a second"), Row("TLS handshakes: the event loop is late by, mean", 1000 * seconds / looks, "ms"),
                at_most(f"TLS handshakes: looks at the event loop that were later than {1000 * float(limit):.0f} ms", over / looks, 0.01, "of all"),
            ]  # fmt: skip


async def swaps(bench: Bench) -> list[Row]:
    with bench.server(admin_port=free_port()) as server:
        rate = 0.5 * await bench.capacity(server.address)
        before = await open_loop(server.address, bench.sentences, rate, bench.seconds, bench.generator, KEYS[0])
        memory, times = server.own_bytes(), list[float]()

        async def swap() -> None:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.tables['server']['admin_port']}") as admin:
                load = admin.unary_unary(f"/{messages.ADMIN}/Load", request_serializer=bytes_of)
                for _ in range(20):
                    begun = time.monotonic()
                    await load(messages.LoadRequest(model="en-de"), metadata=metadata(KEYS[2]))
                    times.append(time.monotonic() - begun)

        task = asyncio.create_task(swap())
        during = Flood()
        while not task.done():
            found = await open_loop(server.address, bench.sentences, rate, 1.0, bench.generator, KEYS[0])
            during.answered += found.answered
            during.others += found.others
            during.rejected += found.rejected
        await task
        await asyncio.sleep(1.0)
        return [
            at_most("20 swaps at 0.5 C: failed requests", len(during.rejected) + sum(during.others.values()), 0, ""),
            at_most("20 swaps at 0.5 C: p99 over before", percentile(during.answered, 0.99) / percentile(before.answered, 0.99), 2, ""),
            at_most("20 swaps: memory over before", (server.own_bytes() - memory) / 2**20, 10, "MiB"), Row("a swap", 1000 * percentile(times, 0.5), "ms"),
        ]  # fmt: skip


async def crash(bench: Bench) -> list[Row]:
    with bench.server() as server:
        await live(server.address, bench.sentences, 4, 1.0, key=KEYS[0])
        server.tell(9)
        server.ended(5)
        return [at_most("kill -9: until it is ready again", sorted(_STARTER.submit(server_start, server).result() for _ in range(3))[1], 2, "s")]


def server_start(server: ServerProcess) -> float:
    if server.process is not None and server.process.poll() is None:
        server.tell(9)
        server.ended(5)
    return server.start()


async def sessions(bench: Bench) -> list[Row]:
    most, p99 = 0, 0.0
    with bench.server() as server:
        await live(server.address, bench.sentences, LIVE, 1.0, key=KEYS[0])
        for streams in (32, 64, 96, 128, 192, 256, 384, 512):
            found, _ = await live(server.address, bench.sentences, streams, bench.seconds, key=KEYS[0])
            now = 1000 * percentile(found.seconds, 0.99)
            if now > 200:
                break
            most, p99 = streams, now
    return [Row("live streams at 150 words a minute with p99 <= 200 ms", most, ""), Row("their p99", p99, "ms")]


async def soak(bench: Bench, seconds: float) -> list[Row]:
    """Requests at 0.4 C, bursts of 4 C, speech, slow readers, cancelled calls, bytes that are no messages, and streams that come and go."""
    codes: Counter[str] = Counter()
    with bench.server() as server:
        capacity, until = await bench.capacity(server.address), time.monotonic() + seconds

        async def repeated(work: Callable[[], Awaitable[Any]]) -> None:
            while time.monotonic() < until:
                try:
                    found = await work()
                    if isinstance(found, Flood):
                        codes.update({"OK": len(found.answered), "RESOURCE_EXHAUSTED": len(found.rejected), **found.others})
                except grpc.aio.AioRpcError as error:  # grpc's client says INTERNAL by itself where a call ends during a write
                    codes["ended during a write" if error.details() == "Internal error from Core" else error.code().name] += 1

        async def cancelled() -> None:
            async with channels(server.address, 1) as (channel,):
                tasks = [asyncio.ensure_future(translate(channel, [bench.generator.choice(bench.sentences)], KEYS[1])) for _ in range(20)]
                await asyncio.sleep(bench.generator.random() * 0.05)
                for task in tasks[::2]:
                    task.cancel()
                for found in await asyncio.gather(*tasks, return_exceptions=True):
                    codes[found.code().name if isinstance(found, grpc.aio.AioRpcError) else "cancelled" if isinstance(found, BaseException) else "OK"] += 1

        async def malformed() -> None:
            async with channels(server.address, 1) as (channel,):
                call = channel.unary_unary(f"/{messages.SERVICE}/{bench.generator.choice(('Translate', 'Detect'))}")
                await asyncio.sleep(0.01)
                await call(bench.generator.randbytes(bench.generator.randrange(300)), metadata=metadata(KEYS[1]))

        loads: list[Callable[[], Awaitable[Any]]] = [
            lambda: open_loop(server.address, bench.sentences, 0.4 * capacity, 5, bench.generator, KEYS[1]),
            lambda: _burst(server.address, bench, capacity),
            lambda: live(server.address, bench.sentences, 8, 5, key=KEYS[0]),
            lambda: live(server.address, bench.sentences, 4, 5, 600, slow=4, key=KEYS[0]),
            cancelled,
            malformed,
        ]
        working = [asyncio.create_task(repeated(load)) for load in loads]
        await asyncio.sleep(seconds / 4)
        memory, files = server.own_bytes(), server.descriptors()
        await asyncio.gather(*working)
        await asyncio.sleep(1.0)
        async with channels(server.address, 1) as (channel,):
            stats = channel.unary_unary(f"/{messages.SERVICE}/GetStats", response_deserializer=messages.GetStatsResponse.FromString)
            now = await stats(b"", metadata=metadata(KEYS[0]))
        return [
            at_most(f"soak of {seconds:.0f} s: INTERNAL and UNKNOWN", codes["INTERNAL"] + codes["UNKNOWN"], 0, ""),
            at_most("soak: open streams, waiting and running tokens at its end", now.sessions + now.waiting_tokens + now.running_tokens, 0, ""),
            at_most("soak: memory over that after a quarter", (server.own_bytes() - memory) / 2**20, 20, "MiB"),
            at_most("soak: open files over those after a quarter", server.descriptors() - files, 0, ""),
            *(Row(f"soak: {name}", count, "calls") for name, count in codes.most_common()),
        ]


async def _burst(address: str, bench: Bench, capacity: float) -> Flood:
    await asyncio.sleep(10)
    return await open_loop(address, bench.sentences, 4 * capacity, 2, bench.generator, KEYS[1], TOGETHER)


PARTS: dict[str, Callable[[Bench], Awaitable[list[Row]]]] = {
    "latency": latency, "solo": solo, "overload": overload, "calls": calls, "slow_readers": slow_readers, "fairness": fairness, "memory": memory,
    "scraping": scraping,
    "handshakes": handshakes, "swaps": swaps, "crash": crash, "sessions": sessions,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, English to German")
    parser.add_argument("--text", required=True, help="sentences to translate, one a line")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="this figure, not all")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="everything at once for so long, instead")
    parser.add_argument("--compute-type", default="int8")
    parser.add_argument("--running-tokens", type=int, help="of the model's table; without it, as it is by default")
    parser.add_argument("--results", metavar="FILE", help="write the rows as JSON; those of other figures that are in it stay")
    parser.add_argument("--note", default="", help="what else is to be known of these rows, for the file")
    chosen = parser.parse_args(arguments)
    _STARTER.submit(int).result()  # before this process is nice: what that one starts is not
    os.nice(10)
    options = {"compute_type": chosen.compute_type} | ({"running_tokens": chosen.running_tokens} if chosen.running_tokens else {})
    bench = Bench(chosen.model, [line for line in read_text(chosen.text).splitlines() if line.strip()], chosen.seconds, options)
    rows: dict[str, list[Row]] = {}
    for name in () if chosen.soak else chosen.only or PARTS:
        rows[name] = asyncio.run(_ran(PARTS[name](bench)))
        _show(rows[name])
    if chosen.soak:
        rows["soak"] = asyncio.run(_ran(soak(bench, chosen.soak)))
        _show(rows["soak"])
    if chosen.results:
        _write(Path(chosen.results), rows, {"seconds": chosen.seconds, "note": chosen.note})
    return int(any(row.reached is False for part in rows.values() for row in part))


async def _ran(part: Awaitable[list[Row]]) -> list[Row]:
    return await part


def _show(rows: Sequence[Row]) -> None:
    for row in rows:
        print(f"{row.figure:<68} {row.value:10.3g} {row.unit:<12} {row.asked:>8}  {'' if row.reached is None else 'yes' if row.reached else 'NO'}", flush=True)


def _write(path: Path, rows: dict[str, list[Row]], said: dict[str, Any]) -> None:
    from cvmk.telemetry import environment

    before = json.loads(path.read_text())["rows"] if path.exists() else {}
    found = before | {name: {**said, "figures": [asdict(row) for row in part]} for name, part in rows.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/bench_serve.py MODEL --text FILE"
    path.write_text(json.dumps({"machine": environment(), "command": command, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
