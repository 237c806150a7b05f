from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import train

from cvmk.cli import main
from cvmk.config import TrainConfig
from cvmk.config.loading import load_train_config
from cvmk.errors import ConfigError, DataError
from cvmk.files import locking
from cvmk.training.run_folder import open_run


def start(path: Path, overrides: list[str] | None = None, **options: bool) -> Path:
    config = load_train_config(path, overrides or [])
    with open_run(config, path.read_text(), {}, resume=options.get("resume", False), restart=options.get("restart", False)) as folder:
        (folder / "checkpoints").mkdir(exist_ok=True)
        return folder


def test_a_run_is_not_overwritten(config: Path, tmp_path: Path) -> None:
    folder = start(config)
    (folder / "precious").write_text("x")
    with pytest.raises(ConfigError, match="already holds a run.*--resume.*--restart"):
        start(config)
    assert start(config, resume=True) == folder
    assert (folder / "precious").exists()


def test_restart_sets_the_old_run_aside(config: Path, tmp_path: Path) -> None:
    for _ in range(3):
        start(config, restart=True)
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith("run")) == ["run", "run.old-1", "run.old-2"]


def test_resume_wants_the_same_configuration(config: Path) -> None:
    start(config)
    start(config, ["training.iterations=50", "run.threads=2", "validation.patience=3"], resume=True)
    with pytest.raises(ConfigError, match=r"model\.ffn"):
        start(config, ["model.ffn=32"], resume=True)


def pasted(error: ConfigError) -> list[str]:
    """The arguments of the command in a message."""
    words = shlex.split(re.search(r"go on with (cvmk train .*), or --restart", str(error))[1])  # type: ignore[index]
    assert words[:2] == ["cvmk", "train"]
    return words[2:]


@pytest.mark.parametrize("kept", ["now", "by an older cvmk"])
@pytest.mark.parametrize("moved", [False, True])
def test_the_command_of_the_refusal_goes_on(config: Path, tmp_path: Path, kept: str, moved: bool) -> None:
    """A run with overrides, refused without them: what the message says can be pasted, also where the run was moved."""
    folder = tmp_path / "it's 1 run"
    overrides = ["training.iterations=2", "validation.max_sentences=2", "model.ffn=48", "run.seed=7", f'run.folder="{folder}"']
    train(config, *overrides)
    if kept != "now":
        (folder / "config.toml").write_text(config.read_text() + "".join(f"\n# --set {override}" for override in overrides))
    if moved:
        folder = folder.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="model.ffn|run.seed") as caught:
        train(config, f'run.folder="{folder}"', "training.iterations=2", resume=True)
    path, *rest = pasted(caught.value)
    assert path == str(folder / "config.toml") and rest[-1] == "--resume"
    assert main(["train", path, *rest]) == 0
    assert load_train_config(folder / "config.toml").run.folder == str(folder), "and from now on its own configuration says all of it"
    assert main(["train", path, "--resume"]) == 0


def test_a_folder_of_something_else_is_left_alone(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        start(config)
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        start(config, restart=True)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["thesis.tex"], "a refusal leaves nothing there"


def test_one_process_at_a_time(config: Path) -> None:
    loaded = load_train_config(config)
    with open_run(loaded, "", {}, resume=False, restart=False):
        with pytest.raises(ConfigError, match="another process"):
            start(config, resume=True)
        with pytest.raises(ConfigError, match="another process"):
            start(config, restart=True)
    start(config, resume=True)


Meanwhile = Callable[[Callable[[], object]], None]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Has something done in the moment between a start's opening its lock and holding it, the next time."""

    def meanwhile(act: Callable[[], object]) -> None:
        def flock(file: object, how: int) -> None:
            monkeypatch.setattr(locking.fcntl, "flock", real)
            act()
            real(file, how)

        real = locking.fcntl.flock
        monkeypatch.setattr(locking.fcntl, "flock", flock)

    return meanwhile


def test_a_run_that_came_and_went_meanwhile_is_not_overwritten(config: Path, meanwhile: Meanwhile) -> None:
    meanwhile(lambda: start(config, ["model.ffn=32"]))
    with pytest.raises(ConfigError, match="already holds a run"):
        start(config)
    assert load_train_config(config, ["model.ffn=32"]) == resolved(config)


def test_a_run_that_was_restarted_meanwhile_is_not_resumed(config: Path, meanwhile: Meanwhile) -> None:
    start(config)
    meanwhile(lambda: start(config, ["model.ffn=32"], restart=True))
    with pytest.raises(ConfigError, match=r"model\.ffn"):
        start(config, resume=True)
    assert load_train_config(config, ["model.ffn=32"]) == resolved(config)


@pytest.mark.parametrize("options", [{"restart": True}, {"resume": True}, {}])
def test_of_two_starts_one_has_the_folder(config: Path, tmp_path: Path, meanwhile: Meanwhile, options: dict[str, bool]) -> None:
    """The lock of a run moves with its folder: who waited for it holds what was set aside, not what is trained in."""
    (start(config) / "precious").write_text("x")
    with contextlib.ExitStack() as other:
        meanwhile(lambda: other.enter_context(open_run(load_train_config(config, ["model.ffn=32"]), "", {}, resume=False, restart=True)))
        with pytest.raises(ConfigError, match="another process is training in"):
            start(config, **options)
    assert load_train_config(config, ["model.ffn=32"]) == resolved(config)
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith("run")) == ["run", "run.old-1"]
    assert (tmp_path / "run.old-1" / "precious").exists()


def resolved(config: Path) -> TrainConfig:
    folder = Path(load_train_config(config).run.folder)
    return TrainConfig.model_validate_json((folder / "config.resolved.json").read_text())


def test_a_start_that_failed_early_needs_no_clean_up(config: Path, tmp_path: Path) -> None:
    folder = start(config)
    (folder / "checkpoints").rmdir()
    (folder / "tokenizer").mkdir()
    assert start(config, ["tokenizer.vocabulary=300"]) == folder
    assert not (folder / "tokenizer").exists()


def test_a_file_in_the_way(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(DataError):
        start(config)


def test_no_permission(config: Path, tmp_path: Path, cvmk: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    failed = cvmk("train", config, "--set", "run.folder=/proc/nothing/run")
    assert failed.returncode == 5
    assert "Traceback" not in failed.stderr and "/proc/nothing" in failed.stderr
