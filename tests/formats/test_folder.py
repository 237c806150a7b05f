from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cvmk
from cvmk.errors import DataError
from cvmk.files import write_pointer
from cvmk.formats import load_model_folder, resolve_model_folder, save_model_folder
from cvmk.text.tokenizers import Tokenizer


@pytest.fixture
def saved(tmp_path: Path, make_model, tokenizer: Tokenizer) -> Path:
    folder = tmp_path / "model"
    save_model_folder(folder, make_model(tokenizer.vocab_size), tokenizer, "# A model\n", {"languages": {"source": "en", "target": "de"}, "steps": 7})
    return folder


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in {**config, **changes}.items() if value is not None}))


@pytest.mark.parametrize("tie", [True, False])
def test_round_trip(tmp_path: Path, make_model, tokenizer: Tokenizer, tie: bool) -> None:
    model = make_model(tokenizer.vocab_size, tie_embeddings=tie, positions="rotary", kv_heads=1, activation="swiglu", norm="rmsnorm", bias=False)
    save_model_folder(tmp_path / "deep" / "model", model, tokenizer, "card", {"languages": {"source": "en", "target": "de"}})
    loaded, again, info = load_model_folder(tmp_path / "deep" / "model")
    assert again.fingerprint == tokenizer.fingerprint and loaded.config == model.config and not loaded.training
    src, tgt = torch.randint(4, 200, (2, 7)), torch.randint(4, 200, (2, 5))
    assert torch.equal(loaded(src, tgt)[0], model(src, tgt)[0])
    assert info["format"] == 2 and info["requires"] == [] and info["cvmk"] == cvmk.__version__ and info["vocab_size"] == tokenizer.vocab_size
    assert info["languages"] == {"source": "en", "target": "de"} and info["tokenizer"] == tokenizer.fingerprint
    assert info["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "deep" / "model" / "card.md").read_text() == "card"
    assert ("embeddings.output" in load_file(tmp_path / "deep" / "model" / "model.safetensors")) != tie
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["model"]


def test_folder_has_ordinary_permissions(saved: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o777 & ~mask


def test_saving_again_replaces_the_model_and_keeps_other_files(saved: Path, make_model, tokenizer: Tokenizer) -> None:
    other = make_model(tokenizer.vocab_size, seed=9)
    save_model_folder(saved, other, tokenizer, "second")
    assert torch.equal(load_model_folder(saved)[0].embeddings.source, other.embeddings.source)
    (saved / "state.pt").write_text("mine")
    third = make_model(tokenizer.vocab_size, seed=10)
    save_model_folder(saved, third, tokenizer, "third")
    assert torch.equal(load_model_folder(saved)[0].embeddings.source, third.embeddings.source)
    assert (saved / "state.pt").read_text() == "mine" and (saved / "card.md").read_text() == "third"
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


def test_failed_save_leaves_the_old_model(saved: Path, make_model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {entry.name: entry.read_bytes() for entry in saved.iterdir()}

    def full(folder: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save", full)
    with pytest.raises(DataError, match=r"cannot write .*model: No space left"):
        save_model_folder(saved, make_model(tokenizer.vocab_size, seed=9), tokenizer, "second")
    assert {entry.name: entry.read_bytes() for entry in saved.iterdir()} == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


def test_failed_exchange_puts_the_old_model_back(saved: Path, make_model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {entry.name: entry.read_bytes() for entry in saved.iterdir()}
    rename, calls = os.rename, []

    def second_fails(source: object, target: object) -> None:
        calls.append((source, target))
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(DataError, match="Input/output error"):
        save_model_folder(saved, make_model(tokenizer.vocab_size, seed=9), tokenizer, "second")
    assert {entry.name: entry.read_bytes() for entry in saved.iterdir()} == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]


def test_wrong_calls(tmp_path: Path, make_model, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="30"):
        save_model_folder(tmp_path / "m", make_model(30), tokenizer, "")
    with pytest.raises(ValueError, match="vocab_size"):
        save_model_folder(tmp_path / "m", make_model(tokenizer.vocab_size), tokenizer, "", {"vocab_size": 3})
    (tmp_path / "file").write_text("text")
    with pytest.raises(DataError, match="is a file"):
        save_model_folder(tmp_path / "file", make_model(tokenizer.vocab_size), tokenizer, "")
    with pytest.raises(DataError, match="file"):
        save_model_folder(tmp_path / "file" / "m", make_model(tokenizer.vocab_size), tokenizer, "")
    assert (tmp_path / "file").read_text() == "text" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_run_folder_stands_for_its_model(saved: Path) -> None:
    run = saved.parent
    load_model_folder(run)
    checkpoints = run / "checkpoints"
    checkpoints.mkdir()
    saved.rename(checkpoints / "step-20")
    with pytest.raises(DataError, match="holds no model"):
        resolve_model_folder(run)
    for mark in (lambda: write_pointer(checkpoints / "best", "step-20"), lambda: (checkpoints / "best").symlink_to("step-20")):
        mark()
        for path in (run, checkpoints / "best", checkpoints / "step-20"):
            load_model_folder(path)
        (checkpoints / "best").unlink()
    write_pointer(checkpoints / "best", "step-30")
    with pytest.raises(DataError, match="holds no model"):
        resolve_model_folder(run)
    (checkpoints / "best").unlink()
    (checkpoints / "step-20").rename(checkpoints / "best")  # a copy that followed links
    load_model_folder(run)


def _truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 0x10
    file.write_bytes(data)


def _rewrite(folder: Path, change) -> None:
    """Change the tensors and make the checksum fit."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    edit(folder, weights_sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "empty config": (lambda f: (f / "config.json").write_text(""), r"config\.json is not valid JSON"),
    "cut config": (lambda f: _truncate(f / "config.json", 40), r"config\.json is not valid JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json describes no model"),
    "newer format": (lambda f: edit(f, format=99), r"has format 99 and this cvmk .* reads formats 1 and 2: use the cvmk version that wrote it"),
    "no vocab_size": (lambda f: edit(f, vocab_size=None), r"vocab_size"),
    "wrong key in model": (lambda f: edit(f, model={"d_modle": 3}), r"model\.d_modle"),
    "wrong size in model": (lambda f: edit(f, model={"d_model": -3}), r"model\.d_model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "empty weights": (lambda f: _truncate(f / "model.safetensors", 0), r"model\.safetensors is truncated or corrupt"),
    "weights cut in the header": (lambda f: _truncate(f / "model.safetensors", 100), r"model\.safetensors is truncated or corrupt"),
    "weights cut in the data": (lambda f: _truncate(f / "model.safetensors", 9000), r"model\.safetensors is truncated or corrupt"),
    "weights that are text": (lambda f: (f / "model.safetensors").write_text("hello " * 50), r"model\.safetensors is truncated or corrupt"),
    "a flipped bit": (lambda f: _flip(f / "model.safetensors"), r"model\.safetensors is corrupt \(its checksum"),
    "a tensor too few": (lambda f: _rewrite(f, lambda w: w.pop("encoder.norm.weight")), r"lacks the tensor encoder\.norm\.weight"),
    "a tensor too many": (lambda f: _rewrite(f, lambda w: w.update(x=torch.ones(2))), r"unknown tensor x"),
    "another shape": (lambda f: _rewrite(f, lambda w: w.update({"encoder.norm.weight": torch.ones(17)})), r"encoder\.norm\.weight of shape \[17\].*\[16\]"),
    "not finite": (lambda f: _rewrite(f, lambda w: w["encoder.norm.weight"].fill_(float("nan"))), r"encoder\.norm\.weight.*no finite"),
    "integers": (lambda f: _rewrite(f, lambda w: w.update({"encoder.norm.weight": torch.ones(16, dtype=torch.int32)})), "weight in int32 where"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json does not exist"),
    "cut tokenizer": (lambda f: _truncate(f / "tokenizer.json", 30), r"tokenizer\.json"),
    "another tokenizer": (lambda f: edit(f, tokenizer="0" * 64), r"tokenizer in .* is not the one"),
    "another vocabulary": (lambda f: edit(f, vocab_size=271), r"vocab_size = 271"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence(saved: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    load_model_folder(saved)
    damage(saved)
    with pytest.raises(DataError, match=message) as caught:
        load_model_folder(saved)
    assert "\n" not in str(caught.value) and str(saved) in str(caught.value)


def test_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_model_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no model"):
        load_model_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        load_model_folder(tmp_path / "file")


@pytest.mark.parametrize(("key", "value"), [("d_model", 65536), ("encoder_layers", 200), ("ffn", 262144)])
def test_a_model_larger_than_its_weights_is_told_before_it_is_built(saved: Path, key: str, value: int) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["model"][key] = value
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="config.json"):
        load_model_folder(saved)


def test_a_described_folder_with_weights_is_a_model(tmp_path: Path, make_model, tokenizer: Tokenizer) -> None:
    from cvmk.formats import describe_model

    model = make_model(tokenizer.vocab_size)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    describe_model(tmp_path, model, tokenizer, {"languages": {"source": "en", "target": "de"}})
    loaded, _, info = load_model_folder(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert info["languages"]["target"] == "de"


def test_a_link_stays_and_what_it_points_at_is_written(tmp_path: Path, make_model, tokenizer: Tokenizer) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "link").symlink_to("big disk/model")
    for seed in (1, 2):  # a link to nothing yet, then to a model
        model = make_model(tokenizer.vocab_size, seed=seed)
        save_model_folder(tmp_path / "link", model, tokenizer, "card")
        assert (tmp_path / "link").is_symlink()
        assert torch.equal(load_model_folder(tmp_path / "big disk" / "model")[0].embeddings.source, model.embeddings.source)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["big disk", "link"]
    assert [entry.name for entry in (tmp_path / "big disk").iterdir()] == ["model"]
