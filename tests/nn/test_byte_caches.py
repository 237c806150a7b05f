"""Keys and values in bytes (model.kv_cache = "int8"): what the torch engine decodes with, and what the native engine holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixer_models import make_model
from small_models import WordTokenizer
from torch import Tensor

from cvmk.formats import read_model_manifest, save_model_folder
from cvmk.formats.torch_weights import manifest_of, raw_tensors
from cvmk.inference import Request, SearchOptions
from cvmk.inference.native_engine import NativeEngine
from cvmk.nn import CVMTransformer
from cvmk.quantization.model import quantize_model
from cvmk.quantization.recipe import Recipe

SOURCE = torch.tensor([[5, 9, 4, 17, 3], [6, 7, 3, 0, 0]])
TARGET = torch.tensor([[2, 8, 11, 4, 20, 13, 6], [2, 5, 21, 9, 10, 4, 7]])


def on_grid(x: Tensor) -> Tensor:
    """Heads' vectors [..., D] on the 255 steps of their largest magnitude, a number at a time."""
    found = x.clone().reshape(-1, x.shape[-1])
    for row in found:
        step = float(row.abs().max()) / 127
        for i in range(len(row)):
            row[i] = round(float(row[i]) / step) * step  # halves to even
    return found.view_as(x)


def decoded(model: CVMTransformer, cuts: list[int]) -> Tensor:
    state = model.start(model.encode(SOURCE), max_length=9)
    with torch.inference_mode():
        return torch.cat([model.extend(TARGET[:, a:b], state) for a, b in zip(cuts, cuts[1:], strict=False)], dim=1)


def test_what_is_remembered_is_on_the_grid_and_is_what_is_read() -> None:
    floats, model = (make_model(kv_cache=kind).requires_grad_(False) for kind in ("float", "int8"))
    assert torch.equal(floats(SOURCE, TARGET)[0], model(SOURCE, TARGET)[0])  # whole sequences are computed as before
    memory, whole = model.encode(SOURCE), floats.encode(SOURCE)
    for (keys, values), (wide_keys, wide_values) in zip(memory.cross, whole.cross, strict=True):
        torch.testing.assert_close(keys, on_grid(wide_keys), atol=1e-12, rtol=0)
        torch.testing.assert_close(values, on_grid(wide_values), atol=1e-12, rtol=0)
    state = model.start(memory, max_length=9)
    with torch.inference_mode():
        model.extend(TARGET, state)
    for mixer in state.mixers:
        for name in ("keys", "values"):
            kept = mixer[name][:, :, : TARGET.shape[1]]
            torch.testing.assert_close(kept, on_grid(kept), atol=1e-12, rtol=0)
    expected = decoded(model, [0, 7])
    for cuts in ([*range(8)], [0, 1, 4, 7]):
        torch.testing.assert_close(decoded(model, cuts), expected, atol=1e-11, rtol=0)
    error = (expected - decoded(floats, [0, 7])).abs().max() / expected.abs().max()
    assert 1e-5 < error < 0.02


def test_a_saved_state_goes_on_in_either_kind() -> None:
    floats, model = make_model(), make_model(kv_cache="int8")
    state = floats.start(floats.encode(SOURCE), max_length=9)
    with torch.inference_mode():
        floats.extend(TARGET[:, :3], state)
        restored = model.restore_decoder(state.save())
        assert torch.isfinite(model.extend(TARGET[:, 3:], restored)).all()


def test_keep_caches_changes_an_existing_model_and_back() -> None:
    model = make_model()
    before = decoded(model, [0, 7])
    model.keep_caches("int8")
    assert model.config.kv_cache == "int8" and torch.equal(decoded(model, [0, 7]), decoded(make_model(kv_cache="int8"), [0, 7]))
    model.keep_caches("float")
    assert torch.equal(decoded(model, [0, 7]), before)


@pytest.mark.parametrize("compute_type", ["float32", "int8"])
def test_the_native_engine_holds_bytes(compute_type: str) -> None:
    request = Request(1, list(range(4, 19)), SearchOptions(beam_size=3, max_length_a=0.0, max_length_b=24))
    sizes = []
    for kind in ("float", "int8"):
        model = make_model(dtype=torch.float32, d_model=64, heads=2, kv_cache=kind)
        sizes.append(NativeEngine(manifest_of(model), raw_tensors(model), compute_type, 1).request_bytes(request))
    # A head's 32 numbers are 32 bytes and 4 of the scale, not 128, or 64 in bfloat16.
    assert sizes[1] == pytest.approx(sizes[0] * 36 / (128 if compute_type == "float32" else 64), rel=0.02)


def test_a_folder_says_so(tmp_path: Path) -> None:
    model = make_model(kv_cache="int8")
    save_model_folder(tmp_path / "model", model, WordTokenizer(model.vocab_size), "")
    _, manifest, info = read_model_manifest(tmp_path / "model")
    assert manifest.model.kv_cache == "int8" and "kv_cache:int8" in info["requires"]


def test_quantising_leaves_a_model_that_was_trained_so() -> None:
    pairs = [([5, 9, 4], [8, 11])] * 4
    for trained, wanted, expected in (("int8", "float", "int8"), ("float", "int8", "int8"), ("float", "float", "float")):
        model = make_model(dtype=torch.float32, d_model=32, ffn=32, kv_cache=trained)
        built = quantize_model(model, Recipe("w8a8", "rtn", kv_cache=wanted), pairs).build()  # type: ignore[arg-type]
        assert built.config.kv_cache == expected and built.decoder.blocks[0].cross.heads.byte_cache == (expected == "int8")
        assert model.config.kv_cache == trained
