"""Reading safetensors without torch: what the library writes is read bit for bit, what is damaged is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from cvmk.errors import DataError
from cvmk.formats.tensors import let_go, read_tensors
from cvmk.formats.torch_weights import read_weights

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16,
    torch.uint32, torch.uint64,
)  # fmt: skip


def some(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.arange(1, 1 + int(np.prod(shape))).reshape(shape)
    return (values % 2 == 0) if dtype == torch.bool else values.to(dtype)


def file_of(header: object, body: bytes, path: Path) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def test_every_dtype_and_odd_shapes(tmp_path: Path) -> None:
    tensors = {f"{dtype}.{shape}": some(dtype, shape) for dtype in DTYPES for shape in ((), (3,), (0,), (2, 0, 3), (2, 3, 5))}
    file = tmp_path / "weights"
    file.write_bytes(save(tensors, {"made": "here"}))
    raw, found = read_tensors(file, hashlib.sha256(file.read_bytes()).hexdigest()), read_weights(file)
    assert raw.keys() == found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) and found[name].shape == tensor.shape
        assert raw[name].dtype == str(tensor.dtype).removeprefix("torch.") and raw[name].shape == tuple(tensor.shape)
        assert not raw[name].data.flags.writeable or not raw[name].data.size
        if raw[name].is_float:
            assert raw[name].float32().dtype == np.float32 and np.array_equal(raw[name].float32(), tensor.float().numpy())
        else:
            assert np.array_equal(raw[name].data, tensor.numpy())


def test_bfloat16_by_bits(tmp_path: Path) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    (tmp_path / "weights").write_bytes(save({"x": every}))
    found = read_tensors(tmp_path / "weights")["x"]
    assert np.array_equal(found.float32().view(np.uint32), every.float().numpy().view(np.uint32))


def test_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(save({"x": torch.ones(4)}))
    found = read_weights(file)["x"]
    found.add_(1)
    file.write_bytes(b"")
    assert found.tolist() == [2, 2, 2, 2]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell which pages of a file are in memory")
def test_pages_that_are_let_go(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(save({"x": torch.ones(2**20), "y": torch.zeros(0)}))

    def resident() -> int:
        text = Path("/proc/self/smaps").read_text().split(str(file))[1]
        return int(text.split("Rss:")[1].split()[0]) << 10

    tensors = read_tensors(file)
    assert tensors["x"].data.sum() == 2**20 and resident() > 2**22
    let_go(tensors.values())
    assert resident() < 2**16 and tensors["x"].data.sum() == 2**20


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "nothing": (b"", b"", "0 bytes"),
    "a header of no object": ([1], b"", "no JSON object"),
    "a header of no JSON": (b"{", b"", "no valid JSON"),
    "a header that is not UTF-8": (b"\xff\xfe{}", b"", "no valid JSON"),
    "a header that nests": (b"[" * 100_000, b"", "no valid JSON"),
    "a name twice": (b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", "twice"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "does not describe the tensor a"),
    "no object": ({"a": 3}, bytes(8), "does not describe the tensor a"),
    "three offsets": ({"a": {**ONE, "data_offsets": [0, 4, 8]}}, bytes(8), "does not describe the tensor a"),
    "a negative size": ({"a": {**ONE, "shape": [-2]}}, bytes(8), "does not describe the tensor a"),
    "a size that is a truth": ({"a": {**ONE, "shape": [True, 2]}}, bytes(8), "does not describe the tensor a"),
    "offsets that go back": ({"a": {**ONE, "shape": [0], "data_offsets": [8, 0]}}, bytes(8), "does not describe the tensor a"),
    "an unknown dtype": ({"a": {**ONE, "dtype": "F31"}}, bytes(8), "unknown dtype 'F31'"),
    "another size": ({"a": {**ONE, "shape": [3]}}, bytes(8), r"not the size of its shape \[3\]"),
    "beyond the end": ({"a": ONE}, bytes(7), "ends at byte 8 of the data, which has 7"),
    "too much data": ({"a": ONE}, bytes(9), "fill 8 bytes and the data has 9"),
    "a gap": ({"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}}, bytes(20), "begins at byte 12 of the data and not at 8"),
    "an overlap": ({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12), "begins at byte 4 of the data and not at 8"),
    "a huge empty shape": ({"a": {**ONE, "shape": [2**63, 0], "data_offsets": [0, 0]}}, b"", "corrupt"),
    "a huge empty shape of small sizes": ({"a": {**ONE, "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}, b"", "no memory holds"),
    "too many dimensions": ({"a": {**ONE, "shape": [1] * 100 + [2]}}, bytes(8), "corrupt"),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    header, body, message = BAD[name]
    file = file_of(header, body, tmp_path / "weights") if name != "nothing" else tmp_path / "weights"
    if name == "nothing":
        file.write_bytes(b"")
    with pytest.raises(DataError, match=message) as caught:
        read_tensors(file, remedy="take another")
    assert str(file) in str(caught.value) and str(caught.value).endswith(": take another") and "\n" not in str(caught.value)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError, match="its header is cut off"):
        read_tensors(tmp_path / "weights")
    with pytest.raises(DataError, match="is missing"):
        read_tensors(tmp_path / "nowhere")


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_damaged_gives_an_error_or_what_the_library_reads(tmp_path: Path, data: st.DataObject) -> None:
    """A file with some bytes changed, or cut, or lengthened: a DataError, or the very tensors that safetensors reads in it."""
    whole = bytearray(save({"a": some(torch.float32, (2, 3)), "b": some(torch.int8, (5,)), "c": some(torch.bfloat16, ())}))
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1) | st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.sampled_from(list(b"0123456789,[]{}\":-ab F\x00\xff")) | st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
    damaged = bytes(whole[:cut]) + data.draw(st.binary(max_size=3))
    (tmp_path / "weights").write_bytes(damaged)
    try:
        found = read_weights(tmp_path / "weights")
    except DataError:
        return
    try:
        expected = load(damaged)
    except (safetensors.SafetensorError, KeyError):
        raise AssertionError(f"safetensors refuses {damaged!r}") from None
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))
