"""Model folders that are damaged at random: each is one clear error, or a model that translates; never a crash, another exception or much memory."""

from __future__ import annotations

import copy
import json
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from cvmk.config.schema import TokenizerConfig
from cvmk.errors import CvmkError, DataError
from cvmk.formats import read_model_manifest, save_model_folder
from cvmk.formats.tensors import read_tensors
from cvmk.inference import Translator
from cvmk.inference.shortlist import FILE, Shortlist
from cvmk.text.tokenizers import load_tokenizer, train_tokenizer

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
DTYPES = ["BOOL", "U8", "I8", "F16", "BF16", "I32", "F32", "F64", "I64", "F31"]
SIZES = [0, 1, -1, 7, 16, 30, 255, 65536, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 2**100]
TEXTS = ["", "x", "float32", "rotary", "causal", "0" * 64]
VALUES = [*SIZES, *TEXTS, None, True, False, 0.5, -1.5, 1e308, float("nan"), float("inf"), [], ["attention"], [None], [[]] * 3, {}, {"type": "float32"}]
MORE_MEMORY = 1 << 30
"""Bytes of addresses that a load may take: models here have some kilobytes."""


@pytest.fixture(params=["fallback", "bpe"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, make_model: Callable[..., Any]) -> Path:
    texts = ["a man rides a horse", "two horses ride a man", "a horse and a man ride home", "people eat at a long table"] * 20
    tokenizer = train_tokenizer(texts, TokenizerConfig(kind=request.param, vocabulary=280))
    save_model_folder(tmp_path, make_model(tokenizer.vocab_size, sharpness=2.0, encoder_layers=1, decoder_layers=1), tokenizer, "")
    starts = np.arange(0, 2 * tokenizer.vocab_size + 1, 2, dtype=np.int32)
    Shortlist(starts, np.full(2 * tokenizer.vocab_size, 9, np.int32), np.array([5], np.int32)).save(tmp_path)
    return tmp_path


@pytest.fixture
def little_memory() -> Iterator[None]:
    """More than this would be a size that somebody declared."""
    used = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# -- kinds of damage --------------------------------------------------------------------------------------------------------------
def bytes_damaged(draw: Callable[..., Any], whole: bytes) -> bytes:
    """Some bytes changed, or bits turned; then a part cut off, left out, or put in twice."""
    damaged = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        if damaged:
            at = draw(st.integers(0, len(damaged) - 1) | st.integers(0, min(len(damaged), 3000) - 1))
            damaged[at] = draw(st.sampled_from([damaged[at] ^ (1 << bit) for bit in range(8)]) | st.integers(0, 255))
    begin, end = sorted((draw(st.integers(0, len(whole))), draw(st.integers(0, len(whole)))))
    parts = {"nothing": damaged, "the end": damaged[:end], "the beginning": damaged[begin:], "a part": damaged[:begin] + damaged[end:]}
    parts |= {"twice": damaged[:end] + damaged[begin:], "nulls": damaged[:begin] + bytes(end - begin) + damaged[end:]}
    return bytes(parts[draw(st.sampled_from(sorted(parts)))])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON value; of lists only the first few entries."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def json_damaged(draw: Callable[..., Any], value: Any) -> Any:
    """Values replaced, keys left out or added, entries exchanged."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            return value
        *above, key = draw(st.sampled_from(found))
        holder = value
        for step in above:
            holder = holder[step]
        what = draw(st.sampled_from(["replace", "replace", "remove", "add", "exchange"]))
        if what == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif what == "remove":
            del holder[key]
        elif what == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["new", "format", "default", "weights", "bias"]))] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif what == "exchange":
            other = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else list(range(len(holder)))))
            holder[key], holder[other] = holder[other], holder[key]
    return value


def header_damaged(draw: Callable[..., Any], whole: bytes) -> bytes:
    """A safetensors file whose header says something else: dtypes, shapes, offsets, names, its own length."""
    length = int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")
    for _ in range(draw(st.integers(1, 3))):
        entry = header.get(draw(st.sampled_from(names)), {})
        what = draw(st.sampled_from(["dtype", "shape", "sizes", "offset", "json", "names"]))
        if what == "dtype":
            entry["dtype"] = draw(st.sampled_from(DTYPES))
        elif what == "shape" and entry.get("shape"):
            entry["shape"][draw(st.integers(0, len(entry["shape"]) - 1))] = draw(st.sampled_from(SIZES))
        elif what == "sizes" and entry.get("shape"):
            shape = entry["shape"]
            entry["shape"] = draw(st.sampled_from([shape[::-1], [*shape, 1], [1, *shape], [math.prod(shape)], []]))
        elif what == "offset" and entry.get("data_offsets"):
            entry["data_offsets"][draw(st.integers(0, 1))] += draw(st.sampled_from([-8, -1, 1, 4, 2**40, 2**63]))
        elif what == "json":
            header = json_damaged(draw, header)
        elif what == "names":
            one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
            header[one], header[other] = header.get(other), header.get(one)
    text = json.dumps(header).encode()
    text += b" " * draw(st.integers(0, 9))  # the data need not be aligned
    length = draw(st.sampled_from([len(text)] * 6 + [0, len(text) - 1, len(text) + 1, 2**63 - 1, 2**64 - 1]))
    return length.to_bytes(8, "little") + text + body


def folder_damaged(draw: Callable[..., Any], sound: dict[str, bytes], folder: Path) -> None:
    """Write the files with one or two of them damaged, with the checksum of the weights or without."""
    files = dict(sound)
    if draw(st.booleans()):
        files[CONFIG] = json.dumps({**json.loads(files[CONFIG]), "weights_sha256": None}).encode()
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from([CONFIG, WEIGHTS, WEIGHTS, TOKENIZER, FILE, *sorted(files)]))
        if draw(st.integers(0, 3)) == 0:
            files[name] = bytes_damaged(draw, files[name])
        elif name.endswith(".json"):
            try:
                files[name] = json.dumps(json_damaged(draw, json.loads(files[name]))).encode()
            except (ValueError, RecursionError):  # it was damaged before
                continue
        elif name.endswith(".safetensors"):
            try:
                files[name] = header_damaged(draw, files[name])
            except (ValueError, LookupError, TypeError, AttributeError):
                continue
        else:
            files[name] = bytes_damaged(draw, files[name])
    for name, content in files.items():
        (folder / name).write_bytes(content)


# -- what comes of it -------------------------------------------------------------------------------------------------------------
def check(folder: Path, engine: str, compute_type: str) -> None:
    try:
        translator = Translator(folder, engine=engine, compute_type=compute_type, threads=1)
        found = translator.translate(["a man rides", ""], beam_size=2)
    except CvmkError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return
    assert len(found) == 2 and found[1].text == ""


def run(folder: Path, data: st.DataObject, engine: str) -> None:
    compute_type = data.draw(st.sampled_from(["auto", "int8", "int4", "bfloat16"] if engine == "native" else ["auto", "bfloat16"]))
    sound = folder / "sound"
    if not sound.exists():
        sound.mkdir()
        for file in [file for file in folder.iterdir() if file.is_file()]:
            file.rename(sound / file.name)
    folder_damaged(data.draw, {file.name: file.read_bytes() for file in sound.iterdir()}, folder)
    check(folder, engine, compute_type)


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("engine", ["native", "torch"])
@settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=QUIET)
@given(data=st.data())
def test_damage_is_an_error_or_harmless(folder: Path, engine: str, data: st.DataObject) -> None:
    run(folder, data, engine)


@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("engine", ["native", "torch"])
@settings(max_examples=3000, deadline=None, suppress_health_check=QUIET)
@given(data=st.data())
def test_much_damage(folder: Path, engine: str, data: st.DataObject) -> None:
    run(folder, data, engine)


def test_the_sound_folder_translates(folder: Path) -> None:
    check(folder, "native", "int8")
    assert Translator(folder).translate(["a man rides"], shortlist=True)[0].text is not None


DOUBLING = ["4 4", *(f"{id} {id}" for id in range(260, 310))]


@pytest.mark.parametrize(("key", "value"), [
    ("normalization", []), ("normalization", {}), ("kind", []), ("format", {}), ("merges", [["4 4"]]), ("merges", DOUBLING),
])  # fmt: skip
def test_a_damaged_tokenizer(tmp_path: Path, key: str, value: Any) -> None:
    train_tokenizer(["a man rides a horse"] * 20, TokenizerConfig(kind="fallback", vocabulary=270)).save(tmp_path)
    description = json.loads((tmp_path / TOKENIZER).read_text())
    (tmp_path / TOKENIZER).write_text(json.dumps({**description, key: value, **({"vocabulary": 260 + len(value)} if key == "merges" else {})}))
    with pytest.raises(DataError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("requires", [0, None, [], ["quantum"], {}])
def test_requirements_are_of_format_2(folder: Path, requires: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "format": 1, "requires": requires}))
    assert read_model_manifest(folder)[1].requires == ()


def test_a_tensor_without_its_bytes_aligned(folder: Path) -> None:
    """A header of odd length: what the kernels read stands at even addresses all the same."""
    from safetensors.numpy import load

    expected = Translator(folder).translate(["a man rides"], n_best=2, beam_size=2)[0]
    whole = save(load((folder / WEIGHTS).read_bytes()))
    length = int.from_bytes(whole[:8], "little")
    for more in range(1, 8):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "weights_sha256": None}))
        (folder / WEIGHTS).write_bytes((length + more).to_bytes(8, "little") + whole[8 : 8 + length] + b" " * more + whole[8 + length :])
        assert all(np.frombuffer(tensor.buffer, np.uint8).ctypes.data % 4 == 0 for tensor in read_tensors(folder / WEIGHTS).values())
        for engine in ("native", "torch"):
            found = Translator(folder, engine=engine).translate(["a man rides"], n_best=2, beam_size=2)[0]
            assert [h.tokens for h in found.hypotheses] == [h.tokens for h in expected.hypotheses]
