from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from cvmk.errors import DataError
from cvmk.training.checkpoint import Checkpoint, CheckpointStore


def checkpoint(value: float) -> Checkpoint:
    return Checkpoint({"w": torch.full((3,), value)}, {"random": torch.get_rng_state()}, {"step": value})


def test_save_load_links_and_pruning(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.newest() is None and store.target("best") is None
    for step in (0, 10, 20, 30, 40):
        store.save(step, checkpoint(step), best=step == 10)
    assert sorted(store.steps()) == [10, 30, 40]  # the best and the two newest
    assert (store.target("best"), store.target("last"), store.newest()) == (10, 40, 40)
    loaded = store.load(30)
    assert loaded.values == {"step": 30} and loaded.weights["w"].tolist() == [30.0] * 3
    store.drop_after(10)
    assert store.steps() == [10] and store.newest() == 10


def as_links(folder: Path) -> None:
    """Pointers as cvmk wrote them once."""
    for name in ("best", "last"):
        target = (folder / name).read_text().strip()
        (folder / name).unlink()
        (folder / name).symlink_to(target)


@pytest.mark.parametrize("form", ["files", "links", "copies of links", "lost"])
def test_pointers_of_any_age_and_copies_of_them(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, keep=2)
    for step in (0, 10, 20, 30):
        store.save(step, Checkpoint({"w": torch.zeros(1)}, {}, {"progress": {"step": step}}), best=step == 10)
    assert (folder / "best").read_text() == "step-10\n"
    if form != "files":
        as_links(folder)
    if form == "copies of links":
        shutil.copytree(folder, tmp_path / "copy")  # follows links, as cp -rL does
        folder = tmp_path / "copy"
        assert (folder / "best" / "state.json").is_file() and not (folder / "best").is_symlink()
    if form == "lost":
        for name in ("best", "last"):
            (folder / name).unlink()
    store = CheckpointStore(folder, keep=2)
    assert sorted(store.steps()) == [10, 20, 30]
    assert (store.target("best"), store.target("last"), store.newest()) == ((None, None, 30) if form == "lost" else (10, 30, 30))
    store.save(40, Checkpoint({"w": torch.zeros(1)}, {}, {"progress": {"step": 40}}), best=True)
    assert (store.target("best"), store.target("last")) == (40, 40)
    assert sorted(os.listdir(folder)) == ["best", "last", "step-30", "step-40"]
    assert (folder / "best").read_text() == "step-40\n"


def test_a_pointer_to_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(5, checkpoint(1.0), best=True)
    for text in ("step-6\n", "", "step-5/../step-5", "nonsense", "\x00"):
        (tmp_path / "last").write_text(text)
        assert store.target("last") is None and store.newest() == 5


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    monkeypatch.setattr(os, "link", refused)
    store = CheckpointStore(tmp_path, keep=2)
    store.save(5, checkpoint(1.0), best=True)
    assert (store.target("best"), store.newest()) == (5, 5)


@pytest.mark.parametrize("left", [".last.pointer", ".best.gone/state.json", ".best.pointer"])
def test_crash_while_a_pointer_moves(tmp_path: Path, left: str) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(5, checkpoint(1.0), best=True)
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("step")
    assert store.newest() == 5
    assert sorted(os.listdir(tmp_path)) == ["best", "last", "step-5"]


def test_same_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(5, checkpoint(1.0))
    store.save(5, checkpoint(2.0))
    assert store.load(5).values == {"step": 2.0}
    assert [entry for entry in os.listdir(tmp_path) if entry.startswith(".")] == []


def test_full_disk_keeps_the_last_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, checkpoint(1.0), best=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(DataError, match="cannot write"):
            store.save(2, Checkpoint({"w": torch.zeros(10_000)}, {}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.newest() == 1 and store.load(1).values == {"step": 1.0}
    assert sorted(os.listdir(tmp_path)) == ["best", "last", "step-1"]


def test_crash_between_the_renames(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, checkpoint(1.0))
    os.rename(tmp_path / "step-1", tmp_path / ".step-1.old")  # killed after moving the old one aside
    (tmp_path / ".step-2.partial").mkdir()  # and in the middle of writing the next
    assert store.newest() == 1
    assert store.load(1).values == {"step": 1.0}


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "missing"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, checkpoint(1.0))
    path = tmp_path / "step-1" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncate": data[: len(data) // 2], "empty": b"", "garbage": b"\x80garbage" * 20}[damage])
    with pytest.raises(DataError) as caught:
        store.load(1)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert damage == "missing" or "remove this checkpoint" in str(caught.value)


def test_crash_while_removing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of removing a folder: what is left of it no longer has the name of a checkpoint."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, checkpoint(step))

    def killed(path: Path, **options: object) -> None:
        if path.exists() and (path / "model.safetensors").exists():
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cvmk.training.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.drop_after(1)
    assert store.newest() == 1
    assert [entry for entry in os.listdir(tmp_path) if entry.startswith(".")] == []
