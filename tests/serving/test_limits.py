"""Rates by a clock of the test, sessions, and what one request may have."""

from __future__ import annotations

import contextlib
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvmk.config.serve import LimitsConfig
from cvmk.serving import limits as module
from cvmk.serving.auth import Caller
from cvmk.serving.errors import ServiceError, Status
from cvmk.serving.limits import Bucket, Limits

ALICE, BOB = Caller("key:alice"), Caller("key:bob")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refusal(limits: Limits, caller: Caller, characters: int = 1, requests: int = 1) -> ServiceError | None:
    try:
        limits.admit_request(caller, characters, requests=requests)
    except ServiceError as error:
        assert error.status is Status.RESOURCE_EXHAUSTED
        return error
    return None


def test_requests_a_minute(clock: Clock) -> None:
    limits = Limits(LimitsConfig(requests_per_minute=6), clock)
    assert not any(refusal(limits, ALICE) for _ in range(6))
    refused = refusal(limits, ALICE)
    assert refused is not None and refused.retry_after == pytest.approx(10) and "more than 6 requests a minute: try again in 10.0 s" in str(refused)
    assert refusal(limits, BOB) is None  # nobody else is held up
    clock.now += 9.99
    assert refusal(limits, ALICE) is not None
    clock.now += 0.01
    assert refusal(limits, ALICE) is None and refusal(limits, ALICE) is not None
    clock.now += 60
    assert not any(refusal(limits, ALICE) for _ in range(6))


def test_characters_a_minute_and_requests_are_counted_together_or_not_at_all(clock: Clock) -> None:
    limits = Limits(LimitsConfig(requests_per_minute=2, characters_per_minute=600), clock)
    assert refusal(limits, ALICE, 500) is None
    for _ in range(5):
        refused = refusal(limits, ALICE, 200)
        assert refused is not None and refused.retry_after == pytest.approx(10) and "characters" in str(refused)
    assert refusal(limits, ALICE, 100) is None  # the refused ones are not among the two requests
    refused = refusal(limits, ALICE, 0)
    assert refused is not None and "requests" in str(refused)
    clock.now += 20
    assert refusal(limits, ALICE, 200, requests=0) is None  # an event of a stream
    assert refusal(limits, ALICE, 1, requests=0) is not None


def test_what_never_fits_is_told_so(clock: Clock) -> None:
    refused = refusal(Limits(LimitsConfig(characters_per_minute=100), clock), ALICE, 101)
    assert refused is not None and refused.retry_after is None and "send it in parts" in str(refused)
    assert refusal(Limits(LimitsConfig(characters_per_minute=100), clock), ALICE, 100) is None


def test_without_rates_nothing_is_counted(clock: Clock) -> None:
    limits = Limits(LimitsConfig(), clock)
    assert not any(refusal(limits, ALICE, 10**9) for _ in range(100)) and not limits._buckets


def test_after_the_time_that_it_says_a_request_is_taken(clock: Clock) -> None:
    limits = Limits(LimitsConfig(requests_per_minute=7, characters_per_minute=1300), clock)
    random.seed(3)
    begin, taken, waits = clock.now, 0, 0
    for _ in range(300):
        characters = random.randrange(900)
        while (refused := refusal(limits, ALICE, characters)) is not None:
            assert refused.retry_after is not None and refused.retry_after > 0
            clock.now += refused.retry_after * 0.9
            assert refusal(limits, ALICE, characters) is not None
            clock.now += refused.retry_after * 0.1 + 1e-6
            waits += 1
        taken += characters
    assert waits > 200 and taken <= 1300 + (clock.now - begin) / 60 * 1300 + 1


def test_idle_callers_are_forgotten_and_their_number_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(LimitsConfig(requests_per_minute=2), clock)
    for number in range(1000):
        clock.now += 1
        limits.admit_request(Caller(f"peer:{number}"), 1)
        assert len(limits._buckets) <= 61
    monkeypatch.setattr(module, "_KNOWN", 10)
    for number in range(1000):
        limits.admit_request(Caller(f"peer:{number}"), 1)
        limits.admit_request(ALICE, 1) if number % 500 == 0 else None
        assert len(limits._buckets) <= 61
    assert len(limits._buckets) == 10
    limits.admit_request(ALICE, 1)


def test_a_caller_who_goes_on_asking_is_not_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KNOWN", 10)
    limits = Limits(LimitsConfig(requests_per_minute=2), clock)
    limits.admit_request(ALICE, 1)
    limits.admit_request(ALICE, 1)
    for number in range(100):
        limits.admit_request(Caller(f"peer:{number}"), 1)
        assert refusal(limits, ALICE) is not None


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 12)), max_size=60))
def test_a_bucket_is_the_one_that_is_refilled(events: list[tuple[float, int]]) -> None:
    rate, seconds = 2.0, 5.0
    bucket, level, now = Bucket(rate, seconds), rate * seconds, 0.0
    for later, tokens in events:
        now += later
        level = min(level + rate * later, rate * seconds)
        wait = bucket.wait(tokens, now)
        if tokens > rate * seconds:
            assert wait == math.inf
        elif level >= tokens + 1e-6:
            assert wait == 0
        elif level <= tokens - 1e-6:
            assert wait == pytest.approx((tokens - level) / rate, abs=1e-6)
        if wait == 0:
            bucket.take(tokens, now)
            level -= tokens


def test_events_are_slowed_down_not_refused(clock: Clock) -> None:
    pace = Limits(LimitsConfig(events_per_second=50), clock).pace()
    assert [pace.delay() for _ in range(50)] == [0.0] * 50  # a burst
    begin = clock.now
    for _ in range(500):
        clock.now += pace.delay()
    assert clock.now - begin == pytest.approx(10)
    clock.now += 100
    assert [pace.delay() for _ in range(50)] == [0.0] * 50 and pace.delay() == pytest.approx(1 / 50)


def test_sessions(clock: Clock) -> None:
    limits = Limits(LimitsConfig(sessions=5, sessions_per_client=3), clock)
    with contextlib.ExitStack() as stack:
        for caller in (ALICE, ALICE, ALICE, BOB):
            stack.enter_context(limits.session(caller))
        with pytest.raises(ServiceError, match="3 sessions of yours are open") as error, limits.session(ALICE):
            pass
        assert error.value.status is Status.RESOURCE_EXHAUSTED and error.value.retry_after
        with limits.session(BOB), pytest.raises(ServiceError, match="5 sessions are open"), limits.session(Caller("key:carol")):
            pass
        assert limits.sessions == 4
    assert limits.sessions == 0 and not limits._sessions
    with pytest.raises(KeyError), limits.session(ALICE):
        raise KeyError
    assert limits.sessions == 0 and not limits._sessions


@pytest.mark.parametrize("text", ["", " ", "\t\n ", "Guten Tag", "日本語", "👩‍👩‍👧", "\u202eabc", "a" + "\u0301" * 100, "\ufeffx", "\uffff", "x" * 1000])
def test_texts_that_are_fine(text: str) -> None:
    limits = Limits(LimitsConfig(text_bytes=1000))
    assert limits.check_text("text", text.encode()) == limits.check_text("text", text) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"abc\xff", "texts[2] is not UTF-8, or has half of a surrogate pair, at byte 4"),
        (b"\xed\xa0\x80", "at byte 1"),  # a surrogate
        ("ab\ud800", "at byte 3"),
        ("ab\ude00", "at byte 3"),
        (b"\xc0\x80", "at byte 1"),  # an overlong NUL
        (b"\xf4\x90\x80\x80", "at byte 1"),  # behind the last character
        ("ü".encode()[:1], "at byte 1"),
        (b"secret\0", "texts[2] has a NUL as character 7"),
        ("ü\0", "as character 2"),
        (b"x" * 1001, "texts[2] is longer than 1000 bytes of UTF-8"),
        ("x" * 1001, "longer than 1000 bytes"),
        ("ü" * 501, "longer than 1000 bytes"),
        ("x" * 10**6, "longer than 1000 bytes"),
    ],
)
def test_texts_that_are_not(text: bytes | str, said: str) -> None:
    with pytest.raises(ServiceError) as error:
        Limits(LimitsConfig(text_bytes=1000)).check_text("texts[2]", text)
    assert error.value.status is Status.INVALID_ARGUMENT and error.value.field == "texts[2]" and said in str(error.value)
    assert "secret" not in str(error.value) and error.value.__context__ is None  # a decoder's exception holds the text


@given(st.binary(max_size=64))
def test_any_bytes_are_a_text_or_an_invalid_argument(data: bytes) -> None:
    limits = Limits(LimitsConfig(text_bytes=32))
    try:
        text = limits.check_text("text", data)
    except ServiceError as error:
        assert error.status is Status.INVALID_ARGUMENT
    else:
        assert text.encode() == data and len(data) <= 32 and "\0" not in text


def test_texts_of_a_request() -> None:
    limits = Limits(LimitsConfig(texts=2))
    assert limits.check_texts("texts", [b"a", "b"]) == ["a", "b"]
    for texts, said in (([], "texts is empty"), ([b"a"] * 3, "texts has 3 texts, and a request may have 2"), ([b"a", b"\xff"], "texts[1] is not UTF-8")):
        with pytest.raises(ServiceError) as error:
            limits.check_texts("texts", texts)
        assert error.value.status is Status.INVALID_ARGUMENT and said in str(error.value)


def test_what_a_search_may_be() -> None:
    limits = Limits(LimitsConfig(beam_size=8, alternatives=4))
    limits.check_search(0, 0)
    limits.check_search(8, 4)
    for beam, alternatives, said in (
        (9, 0, "beam_size must be from 0 to 8"),
        (-1, 0, "beam_size"),
        (1, 5, "alternatives must be from 0 to 4"),
        (1, 10_000, "alternatives"),
    ):
        with pytest.raises(ServiceError) as error:
            limits.check_search(beam, alternatives)
        assert error.value.status is Status.INVALID_ARGUMENT and said in str(error.value)
