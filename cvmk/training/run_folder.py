"""The folder of a run: one process at a time, never overwritten unasked, resumed only by the same configuration."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cvmk.config import TrainConfig
from cvmk.config.loading import load_train_config
from cvmk.config.overrides import toml_value
from cvmk.config.resume import changed_keys
from cvmk.errors import ConfigError, CvmkError, DataError
from cvmk.files import explained, lock, read_json, write_json, write_text
from cvmk.report.names import CONTENTS, ENVIRONMENT, RESOLVED
from cvmk.telemetry import environment
from cvmk.telemetry.commands import command
from cvmk.training.contents import Content, check_contents, to_json

CONFIG = "config.toml"
_LOCK = ".lock"


@contextlib.contextmanager
def open_run(config: TrainConfig, text: str, contents: Mapping[str, Content], *, resume: bool, restart: bool) -> Iterator[Path]:
    """Claim `config.run.folder` for this process and write the configuration into it; `text` is the TOML that says all of it,
    `contents` what the run reads.

    A folder that holds a run already (one that has a checkpoint) is taken over with `resume` (by an unchanged configuration and unchanged contents), set
    aside under another name with `restart`, and an error otherwise. Raises ConfigError or DataError.
    """
    folder = Path(config.run.folder)
    resolved = json.loads(config.model_dump_json())
    with explained(folder, "use the run folder"), contextlib.ExitStack() as claims:
        is_new = claims.enter_context(_claimed(folder))
        if restart and (folder / RESOLVED).exists():
            folder.rename(_unused(folder))  # with its lock, which goes on being held
            is_new = claims.enter_context(_claimed(folder))
        try:
            _check(folder, resolved, contents, resume=resume)
        except CvmkError:
            if is_new:
                (folder / _LOCK).unlink(missing_ok=True)
            raise
        write_json(folder / RESOLVED, resolved)  # first: it makes the folder a run's
        write_text(folder / CONFIG, text)
        write_json(folder / CONTENTS, to_json(contents))
        write_json(folder / ENVIRONMENT, environment())
        yield folder


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Make the folder, if it is not there, and hold it. Says whether nobody held it before."""
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not (folder / _LOCK).exists()
    try:
        held = lock(folder / _LOCK)
    except (BlockingIOError, FileNotFoundError):  # or was set aside this moment
        raise ConfigError(f"another process is training in {folder}: wait for it, stop it, or choose another run.folder") from None
    with held:
        yield is_new


def _check(folder: Path, resolved: dict[str, Any], contents: Mapping[str, Content], *, resume: bool) -> None:
    """Whether a folder that this process holds may be trained in. What a start that failed early has left is taken away."""
    if not (folder / RESOLVED).exists():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and holds no run: choose another run.folder")
    elif not _has_trained(folder):
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)  # it may be of another configuration
    elif resume:
        _check_unchanged(folder, resolved, contents)
    else:
        raise ConfigError(
            f"{folder} already holds a run: add --resume to go on with it, --restart to set it aside and start anew, or --set run.folder=..."
        )


def _has_trained(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("checkpoints", "teacher", "model"))


def _unused(folder: Path) -> Path:
    number = 1
    while (other := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return other


def _own_command(folder: Path, before: dict[str, Any]) -> str:
    """The command that goes on with the run in `folder`, to be pasted: its own config.toml, and what that does not say.

    An older cvmk kept the values of `--set` in config.resolved.json alone; and a run that was moved is no longer in its own run.folder.
    """
    path = folder / CONFIG
    words = ["train", str(path)]
    with contextlib.suppress(ConfigError, DataError):
        kept = json.loads(load_train_config(path).model_dump_json())
        for key in changed_keys(TrainConfig, before, kept, by_content=False):
            if (value := _at(before, key)) is not None:
                words += ["--set", f"{key}={toml_value(value)}"]
        if kept["run"]["folder"] != str(folder):
            words += ["--set", f"run.folder={toml_value(str(folder))}"]
    return command(*words, "--resume")


def _at(values: Any, key: str) -> Any:
    """The value of "section.key"; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _check_unchanged(folder: Path, resolved: dict[str, Any], contents: Mapping[str, Content]) -> None:
    before = read_json(folder / RESOLVED)
    if not isinstance(before, dict):
        raise DataError(f"{folder / RESOLVED} describes no run: restore it, or --restart")
    known = (folder / CONTENTS).exists()  # an older cvmk kept no contents: where they are must then be the same
    changed = changed_keys(TrainConfig, before, resolved, by_content=known)
    if changed:
        differ = f"{', '.join(changed[:5])} {'differs' if len(changed) == 1 else 'differ'}"
        raise ConfigError(f"the run in {folder} was started with another configuration ({differ}): go on with {_own_command(folder, before)}, or --restart")
    if known:
        check_contents(folder, read_json(folder / CONTENTS), contents)
