"""CVMSketch: unbiased, exact where it says so, the same on both backends, mergeable, and restorable."""

from __future__ import annotations

import math
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvmk import ops
from cvmk.ops.native import library, reason
from cvmk.ops.reference.sketch import ReferenceSketch, fold, mix64
from cvmk.ops.sketch import CVMSketch

U64 = 2**64
BACKENDS = [pytest.param("native", marks=pytest.mark.skipif(library() is None, reason=f"no native library: {reason()}")), "reference"]
needs_native = pytest.mark.skipif(library() is None, reason=f"no native library: {reason()}")


def make(backend: str, capacity: int, **options: Any) -> CVMSketch:
    with ops.use(backend):
        sketch = CVMSketch(capacity, **options)
    assert sketch.backend == backend
    return sketch


def zipf(seed: int, length: int, types: int, exponent: float = 1.2) -> np.ndarray:
    """A stream of ids with Zipf frequencies; ids are spread over 64 bits."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, types + 1) ** -exponent
    return rng.choice(types, size=length, p=weights / weights.sum()).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def assert_same_state(a: CVMSketch, b: CVMSketch) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, right[key], err_msg=key)
        else:
            assert value == right[key], key


# -- the functions of the specification -----------------------------------------------------------------------------------------
def test_mix64_is_splitmix64():
    # The first outputs of splitmix64 from seed 0, as published with the generator.
    assert [mix64(k * 0x9E3779B97F4A7C15 % U64) for k in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_fold_is_the_128_bit_product_folded():
    assert fold(U64 - 1, U64 - 1) == (U64 - 2) ^ 1
    assert fold(2**63, 4) == 2


def naive_algorithm_d(stream: list[int], draws: list[int], capacity: int) -> tuple[dict[int, int], int]:
    """Knuth's steps on a plain dict, with the threshold as the exclusive integer bound p * 2^64."""
    bound, buffer = U64, dict[int, int]()
    for a, u in zip(stream, draws, strict=True):
        buffer.pop(a, None)
        if u >= bound:
            continue
        if len(buffer) < capacity:
            buffer[a] = u
            continue
        last = max(buffer, key=lambda item: buffer[item])
        if u > buffer[last]:
            bound = u
        else:
            bound = buffer.pop(last)
            buffer[a] = u
    return buffer, bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [1, 2, 7, 64])
def test_random_mode_is_algorithm_d(backend: str, capacity: int):
    stream = zipf(capacity, 2000, 300).tolist()
    start = mix64((5 + 3 * 0x9E3779B97F4A7C15) % U64)
    draws = [mix64((start + n * 0x9E3779B97F4A7C15) % U64) for n in range(len(stream))]
    buffer, bound = naive_algorithm_d(stream, draws, capacity)
    sketch = make(backend, capacity, seed=5)
    sketch.add(stream)
    state = sketch.state_dict()
    assert dict(zip(state["ids"].tolist(), state["priorities"].tolist(), strict=True)) == buffer
    assert sketch.threshold == bound / U64 and state["seen"] == 2000
    assert sketch.estimate() == pytest.approx(len(buffer) * U64 / bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [1, 5, 100])
def test_hash_mode_keeps_the_smallest_hashes(backend: str, capacity: int):
    stream = zipf(1, 3000, 400)
    keys = [mix64((9 + k * 0x9E3779B97F4A7C15) % U64) for k in (1, 2)]
    hashes = {a: mix64(((a ^ keys[0]) * 0x9E3779B97F4A7C15 + keys[1]) % U64) for a in set(stream.tolist())}
    ordered = sorted(hashes, key=lambda a: hashes[a])
    sketch = make(backend, capacity, priority="hash", seed=9)
    sketch.add(stream)
    assert sketch.sample().tolist() == ordered[:capacity]
    assert sketch.threshold == hashes[ordered[capacity]] / U64
    frequency = Counter(stream.tolist())
    assert sketch.counts().tolist() == [frequency[a] for a in ordered[:capacity]]


# -- statistics -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("priority", ["random", "hash"])
def test_estimate_is_unbiased(priority: Any):
    stream = zipf(3, 3000, 600, 1.1)
    distinct, capacity, runs = len(np.unique(stream)), 40, 1500 if library() else 150
    estimates = []
    for seed in range(runs):
        sketch = CVMSketch(capacity, priority=priority, seed=seed)
        sketch.add(stream)
        estimates.append(sketch.estimate())
    deviation = float(np.std(estimates, ddof=1))
    assert abs(np.mean(estimates) - distinct) < 4 * deviation / math.sqrt(runs)
    assert 0.7 / math.sqrt(capacity) < deviation / distinct < 1.4 / math.sqrt(capacity)


@pytest.mark.parametrize("priority", ["random", "hash"])
def test_every_frequency_band_is_sampled_alike(priority: Any):
    """E[1{x in B} / p] = 1 for rare and frequent x alike."""
    rng = np.random.default_rng(0)
    counts = np.repeat([1, 3, 10, 50], 60)
    stream = rng.permutation(np.repeat(np.arange(240, dtype=np.uint64), counts))
    runs = 1500 if library() else 100
    weights = np.zeros((runs, 4))
    for seed in range(runs):
        sketch = CVMSketch(30, priority=priority, seed=seed)
        sketch.add(stream)
        bands = np.bincount(np.asarray(sketch.sample()).astype(np.int64) // 60, minlength=4)
        weights[seed] = bands / sketch.threshold / 60
    error = weights.std(axis=0, ddof=1) / math.sqrt(runs)
    assert (np.abs(weights.mean(axis=0) - 1) < 4 * error).all(), (weights.mean(axis=0), error)


@pytest.mark.parametrize("priority", ["random", "hash"])
@pytest.mark.parametrize("spacing", [1, 2**32, 2**63 + 1])
def test_structured_ids_estimate_well(priority: Any, spacing: int):
    n, capacity = 20_000, 1000
    ids = np.arange(n, dtype=np.uint64) * np.uint64(spacing)
    sketch = CVMSketch(capacity, priority=priority, seed=2)
    sketch.add(ids)
    assert abs(sketch.estimate() / len(np.unique(ids)) - 1) < 5 / math.sqrt(capacity)


def test_fingerprints_of_short_strings_spread():
    sketch = CVMSketch(500, priority="hash", seed=1)
    sketch.add_bytes(str(n) for n in range(20_000))
    assert abs(sketch.estimate() / 20_000 - 1) < 5 / math.sqrt(500)


# -- both backends, bit for bit ---------------------------------------------------------------------------------------------------
@needs_native
@pytest.mark.parametrize("priority", ["random", "hash"])
@pytest.mark.parametrize("capacity", [1, 2, 17, 100, 1000, 100_000])
def test_native_equals_reference(priority: Any, capacity: int):
    native, plain = (make(backend, capacity, priority=priority, seed=U64 - 1) for backend in ("native", "reference"))
    for stream in (zipf(0, 5000, 3000), np.arange(3000, dtype=np.uint64), zipf(1, 5000, 50), np.array([0, U64 - 1], dtype=np.uint64)):
        native.add(stream)
        plain.add(stream)
        assert_same_state(native, plain)


@needs_native
def test_native_equals_reference_where_the_buffer_shrinks_and_fills_again():
    """A few types that come again and again leave and enter a buffer just too small for them: the lazy structures are renewed."""
    rng = np.random.default_rng(4)
    native, plain = (make(backend, 50, seed=8) for backend in ("native", "reference"))
    stream = rng.integers(0, 60, 30_000)
    native.add(stream)
    plain.add(stream)
    assert_same_state(native, plain)


@needs_native
@pytest.mark.parametrize("priority", ["random", "hash"])
def test_native_equals_reference_for_bytes_of_every_length(priority: Any):
    rng = np.random.default_rng(5)
    items = [rng.integers(0, 256, n).astype(np.uint8).tobytes() for n in range(70) for _ in range(4)]
    items += ["", "Straße", "日本語", "\0", "\0\0", "a" * 16, "a" * 17, *items[::3]]
    native, plain = (make(backend, 100, priority=priority, seed=3) for backend in ("native", "reference"))
    for sketch in (native, plain):
        sketch.add_bytes(items)
    assert_same_state(native, plain)
    known = {item.encode() if isinstance(item, str) else item for item in items}
    assert set(native.sample()) <= known
    if priority == "hash":
        whole = make("native", 1000, priority="hash", seed=3)
        whole.add_bytes(items)
        frequency = Counter(item.encode() if isinstance(item, str) else item for item in items)
        assert dict(zip(whole.sample(), whole.counts().tolist(), strict=True)) == frequency


# -- exactness, merging, chunks, state ---------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(0, 20), st.integers(0, U64 - 1))),
    capacity=st.integers(1, 30),
    seed=st.integers(0, U64 - 1),
    cuts=st.lists(st.integers(0, 100), max_size=4),
    backend=st.sampled_from(["native", "reference"] if library() else ["reference"]),
    priority=st.sampled_from(["random", "hash"]),
)
def test_any_stream(ids: list[int], capacity: int, seed: int, cuts: list[int], backend: str, priority: Any):
    whole = make(backend, capacity, priority=priority, seed=seed)
    whole.add(ids)
    # exact while nothing was left out; never more than fits
    distinct = set(ids)
    assert len(whole) <= min(capacity, len(distinct)) and set(whole.sample().tolist()) <= distinct and whole.seen == len(ids)
    if len(distinct) <= capacity:
        assert whole.estimate() == len(distinct) and whole.threshold == 1 and set(whole.sample().tolist()) == distinct
    # cut into calls, and through a checkpoint at every cut
    pieces = make(backend, capacity, priority=priority, seed=seed)
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        pieces.add(np.array(ids[begin:end], dtype=np.uint64))
        again = make(backend, capacity, priority=priority, seed=seed)
        again.load_state_dict(pieces.state_dict())
        pieces = again
    assert_same_state(whole, pieces)
    if priority == "hash":
        # the sketch of two streams is the merge of two sketches, also where the second kept more
        left, right = (make(backend, size, priority="hash", seed=seed) for size in (capacity, capacity + 3))
        half = len(ids) // 2
        left.add(ids[:half])
        right.add(ids[half:])
        left.merge(right)
        assert_same_state(left, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_of_bytes_and_with_itself(backend: str):
    words = [f"word {n % 37}" for n in range(200)]
    whole, left, right = (make(backend, 20, priority="hash") for _ in range(3))
    whole.add_bytes(words + words)
    left.add_bytes(words)
    right.add_bytes(words)
    left.merge(right)
    assert_same_state(left, whole)
    right.merge(right)
    assert_same_state(right, whole)
    empty = make(backend, 20, priority="hash")
    empty.merge(whole)
    assert_same_state(empty, whole)
    with pytest.raises(ValueError, match="byte strings"):
        empty.add([1])


@needs_native
def test_merge_across_backends_and_state_across_backends():
    stream = zipf(6, 4000, 1000)
    whole = make("native", 64, priority="hash")
    whole.add(stream)
    native, plain = make("native", 64, priority="hash"), make("reference", 64, priority="hash")
    native.add(stream[:2000])
    plain.add(stream[2000:])
    restored = make("reference", 64, priority="hash")
    restored.load_state_dict(native.state_dict())
    restored.merge(plain)
    assert_same_state(restored, whole)
    native.merge(plain)
    assert_same_state(native, whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("priority", ["random", "hash"])
def test_restored_sketch_goes_on_the_same(backend: str, priority: Any, tmp_path: Any):
    stream = zipf(7, 6000, 2000)
    straight = make(backend, 128, priority=priority, seed=11)
    straight.add(stream)
    first = make(backend, 128, priority=priority, seed=11)
    first.add(stream[:2500])
    torch.save(first.state_dict(), tmp_path / "state")
    first.add(stream)  # poison: the state must not follow the sketch
    second = make(backend, 128, priority=priority, seed=11)
    second.add(stream)
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=False))
    second.add(stream[2500:])
    assert_same_state(straight, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("priority", ["random", "hash"])
def test_empty_and_extreme_input(backend: str, priority: Any):
    sketch = make(backend, 1, priority=priority)
    sketch.add([])
    sketch.add(np.empty((0, 3), dtype=np.int32))
    sketch.add_bytes([])
    assert (len(sketch), sketch.seen, sketch.estimate(), sketch.threshold) == (0, 0, 0.0, 1.0)
    assert sketch.sample().dtype == np.uint64 and len(sketch.sample()) == 0
    extremes = make(backend, 4, priority=priority)
    extremes.add([0, U64 - 1, 0, U64 - 1])
    extremes.add(np.array([-1, 0]))
    assert sorted(extremes.sample().tolist()) == [0, U64 - 1] and extremes.estimate() == 2
    if priority == "hash":
        assert extremes.counts().tolist() == [3, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_kinds_of_ids(backend: str):
    expected = make(backend, 10, seed=1)
    expected.add(list(range(30)))
    strided = np.arange(60, dtype=np.int64)[::2] // 2
    for ids in (np.arange(30, dtype=np.uint8), torch.arange(30).reshape(5, 6), range(30), strided, tuple(range(30)), np.arange(30, dtype=">i8")):
        sketch = make(backend, 10, seed=1)
        sketch.add(ids)
        assert_same_state(sketch, expected)


def test_packed_equals_items():
    words = ["ein", "", "Haus", "ein", "Zweiundzwanzig und mehr"]
    data = "".join(words).encode()
    offsets = np.cumsum([0, *map(len, words)])
    one, two = CVMSketch(3, priority="hash"), CVMSketch(3, priority="hash")
    one.add_bytes(words)
    two.add_packed(b"xx" + data + b"y", offsets + 2)
    assert_same_state(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_with_a_wrong_item_adds_nothing(backend: str):
    sketch = make(backend, 3)
    with pytest.raises(UnicodeEncodeError):
        sketch.add_bytes(["good", "\ud800"])
    with pytest.raises(TypeError):
        sketch.add_bytes(["good", None])  # type: ignore[list-item]
    assert len(sketch) == 0 and sketch.seen == 0


def test_threads_may_share_a_sketch():
    sketch = CVMSketch(256, priority="hash")
    streams = [zipf(seed, 20_000 if library() else 500, 3000) for seed in range(4)]
    threads = [threading.Thread(target=sketch.add, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = CVMSketch(256, priority="hash")
    alone.add(np.concatenate(streams))
    assert_same_state(sketch, alone)


# -- refusals -----------------------------------------------------------------------------------------------------------------------
def test_random_priorities_refuse_counts_and_merge():
    sketch = CVMSketch(4)
    with pytest.raises(ValueError, match="no counts.*priority='hash'"):
        sketch.counts()
    with pytest.raises(ValueError, match="independent"):
        sketch.merge(CVMSketch(4))


def test_merge_refuses_what_cannot_be_merged():
    sketch = CVMSketch(4, priority="hash", seed=1)
    with pytest.raises(ValueError, match="seeds 1 and 2"):
        sketch.merge(CVMSketch(4, priority="hash", seed=2))
    with pytest.raises(ValueError, match="capacity 3"):
        sketch.merge(CVMSketch(3, priority="hash", seed=1))
    with pytest.raises(TypeError, match="int"):
        sketch.merge(3)  # type: ignore[arg-type]
    sketch.add([1])
    words = CVMSketch(4, priority="hash", seed=1)
    words.add_bytes(["a"])
    with pytest.raises(ValueError, match="fed by ids"):
        sketch.merge(words)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: CVMSketch(0), ValueError, "capacity is 0"),
        (lambda: CVMSketch(2**31 + 1), ValueError, "capacity"),
        (lambda: CVMSketch(2.5), TypeError, "integer"),  # type: ignore[arg-type]
        (lambda: CVMSketch(3, priority="best"), ValueError, "'random' or 'hash'"),  # type: ignore[arg-type]
        (lambda: CVMSketch(3, seed=-1), ValueError, "seed is -1"),
        (lambda: CVMSketch(3).add([0.5]), TypeError, "float"),
        (lambda: CVMSketch(3).add(np.ones(3)), TypeError, "float64"),
        (lambda: CVMSketch(3).add(np.ones(3, dtype=bool)), TypeError, "bool"),
        (lambda: CVMSketch(3).add([U64]), ValueError, "64 bits"),
        (lambda: CVMSketch(3).add([-(2**63) - 1]), ValueError, "64 bits"),
        (lambda: CVMSketch(3).add_bytes("word"), TypeError, "single item"),
        (lambda: CVMSketch(3).add_bytes(["a", 3]), TypeError, "bytes or str, not int"),  # type: ignore[list-item]
        (lambda: CVMSketch(3).add_packed(b"abc", [0, 4]), ValueError, "offsets"),
        (lambda: CVMSketch(3).add_packed(b"abc", [2, 1, 3]), ValueError, "offsets"),
        (lambda: CVMSketch(3).add_packed(b"abc", [-1, 3]), ValueError, "offsets"),
        (lambda: CVMSketch(3).add_packed(b"abc", np.zeros(0, np.int64)), ValueError, "offsets"),
        (lambda: CVMSketch(3).add_packed(b"abc", [0.0, 3.0]), TypeError, "offsets"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments(backend: str, call: Any, error: type[Exception], words: str):
    with ops.use(backend), pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_states_leave_the_sketch_as_it_was(backend: str):
    sketch = make(backend, 8, priority="hash", seed=1)
    sketch.add(range(50))
    good = sketch.state_dict()
    before = sketch.state_dict()

    def changed(**changes: Any) -> dict[str, Any]:
        return {**good, **changes}

    for state, words in [
        (changed(capacity=9), "capacity 9"),
        (changed(seed=2), "seed 2"),
        (changed(priority="random"), "priority 'random'"),
        ({k: v for k, v in good.items() if k != "limit"}, "'limit'"),
        (changed(ids=good["ids"][:-1]), "lengths"),
        (changed(priorities=good["priorities"] + np.uint64(1)), "priority"),
        (changed(limit=int(good["priorities"][-1]) - 1), "priority"),
        (changed(ids=good["ids"][[0] * 8], priorities=good["priorities"][[0] * 8]), "twice"),
        (changed(counts=good["counts"] + np.uint64(100)), "occurrences"),
    ]:
        with pytest.raises(ValueError, match=words):
            sketch.load_state_dict(state)
        np.testing.assert_array_equal(sketch.state_dict()["ids"], before["ids"])
        assert sketch.state_dict()["limit"] == before["limit"]


def test_backend_choice():
    with ops.use("reference"):
        assert isinstance(CVMSketch(3)._sketch, ReferenceSketch)
    with ops.use("triton"), pytest.raises(NotImplementedError, match="triton: not written"):
        CVMSketch(3)
