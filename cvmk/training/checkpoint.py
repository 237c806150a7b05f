"""Checkpoints of a run: `checkpoints/step-N/{model.safetensors, state.pt, state.json}`, and the pointers `best` and `last`.

A checkpoint is written under a temporary name and renamed, and renamed before it is removed, so a name always stands for a whole
one; the pointers, small files that name a step, are replaced by rename. Runs of an older cvmk have symbolic links in their place, and
copies of such runs whole folders. Beside the weights stands what makes the folder a model that can be translated with.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch

from cvmk.errors import DataError
from cvmk.files import explained, pointed, read_bytes, read_json, sync_folder, write_bytes, write_json, write_pointer
from cvmk.formats import read_weights
from cvmk.training.world import World

WEIGHTS, TENSORS, STATE = "model.safetensors", "state.pt", "state.json"
POINTERS = ("best", "last")
_STEP = re.compile(r"step-(\d+)$")
_REMEDY = "remove this checkpoint's folder to resume from the one before it, or start again"


@dataclass
class Checkpoint:
    """Everything that a run needs to go on as if it had never stopped.

    weights  the model's state; tensors  other tensors (optimiser, projections, random states); values  JSON-ready values.
    """

    weights: dict[str, torch.Tensor]
    tensors: dict[str, Any]
    values: dict[str, Any]


class Checkpoints(Protocol):
    """Where a trainer keeps its checkpoints, by step. All raise DataError for whatever cannot be written or read.

    `save` takes what it needs before it returns, and may write it later: the other calls wait for that, and raise what went wrong.
    """

    def save(self, step: int, checkpoint: Checkpoint, *, best: bool = False) -> None:
        """Keep a checkpoint as the last one (and as the best); older ones that are neither may go."""

    def finish(self) -> None:
        """Return when all that was saved is safe."""

    def load(self, step: int) -> Checkpoint: ...

    def newest(self) -> int | None:
        """The step to resume from."""

    def steps(self) -> list[int]: ...

    def target(self, name: str) -> int | None:
        """The step that is called `name`, "best" or "last"."""

    def point(self, name: str, step: int) -> None:
        """Let `name` be the one of `step`."""

    def drop_after(self, step: int) -> None:
        """Forget the later steps: after a rollback they belong to a past that did not happen."""

    def where(self, step: int) -> str:
        """The place of a checkpoint, for a person."""


class CheckpointStore:
    """The checkpoints of one run in its folder, written at once, by one of the processes of `world`.

    `describe` writes what a model's folder has besides the weights into the folder that it is given.
    """

    def __init__(self, folder: Path, keep: int, describe: Callable[[Path], None] | None = None, world: World | None = None) -> None:
        self.folder, self._keep, self._describe, self._world = folder, keep, describe, world or World()

    def save(self, step: int, checkpoint: Checkpoint, *, best: bool = False) -> None:
        """Write `step-N` whole, point `last` (and `best`) at it, and drop what is no longer pointed at nor among the newest."""
        if self._world.writes:
            self._save(step, checkpoint, best)
        self._world.wait()

    def finish(self) -> None:
        """Nothing waits to be written."""

    def where(self, step: int) -> str:
        return str(self.folder / f"step-{step}")

    def _save(self, step: int, checkpoint: Checkpoint, best: bool) -> None:
        final = self.folder / f"step-{step}"
        temporary = self.folder / f".step-{step}.partial"
        with explained(final, "write the checkpoint"):
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                write_bytes(temporary / WEIGHTS, safetensors.torch.save(checkpoint.weights))
                buffer = io.BytesIO()
                torch.save(checkpoint.tensors, buffer)
                write_bytes(temporary / TENSORS, buffer.getvalue())
                write_json(temporary / STATE, checkpoint.values)
                if self._describe is not None:
                    self._describe(temporary)
                self._swap(temporary, final)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            self.point("last", step)
            if best:
                self.point("best", step)
            self._prune()

    def _swap(self, temporary: Path, final: Path) -> None:
        """Put `temporary` in place of `final`. The old one is moved aside first: a folder cannot be renamed over a full one."""
        aside = self.folder / f".{final.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            os.rename(final, aside)
        os.rename(temporary, final)
        sync_folder(self.folder)
        shutil.rmtree(aside, ignore_errors=True)

    def point(self, name: str, step: int) -> None:
        """Let `name` ("best" or "last") point at `step-N`."""
        if not self._world.writes:
            return
        path = self.folder / name
        with explained(path, "write"):
            if path.is_dir() and not path.is_symlink():  # a copy that followed the links of an older cvmk
                aside = self.folder / f".{name}.gone"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
                shutil.rmtree(aside)
            write_pointer(path, f"step-{step}")

    def _prune(self) -> None:
        linked = {self.target(name) for name in POINTERS}
        steps = sorted(self.steps())
        for step in steps[: -self._keep]:
            if step not in linked:
                self._remove(step)

    def _remove(self, step: int) -> None:
        gone = self.folder / f".step-{step}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(self.folder / f"step-{step}", gone)
        shutil.rmtree(gone)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint."""
        if not self.folder.is_dir():
            return []
        return [int(match[1]) for entry in self.folder.iterdir() if (match := _STEP.match(entry.name)) and not entry.is_symlink()]

    def target(self, name: str) -> int | None:
        """The step that `name` points at; None where it points at no checkpoint of this folder."""
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():
            step = _step_in(path)
        else:
            match = _STEP.match(pointed(path) or "")
            step = int(match[1]) if match else None
        return step if step is not None and (self.folder / f"step-{step}").is_dir() else None

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        if not self._world.writes:
            return
        with explained(self.folder, "remove old checkpoints in"):
            for later in self.steps():
                if later > step:
                    self._remove(later)

    def newest(self) -> int | None:
        """The step to resume from: `last`, or, where a crash fell between two renames, the newest whole checkpoint."""
        return self._world.told(self._newest() if self._world.writes else None)

    def _newest(self) -> int | None:
        self._tidy()
        target = self.target("last")
        if target is not None and (self.folder / f"step-{target}" / STATE).exists():
            return target
        whole = [step for step in self.steps() if (self.folder / f"step-{step}" / STATE).exists()]
        return max(whole, default=None)

    def _tidy(self) -> None:
        """Undo what a crash left half done: put back what was moved aside, drop what was half written or half removed."""
        if not self.folder.is_dir():
            return
        with explained(self.folder, "tidy up the checkpoints in"):
            for entry in list(self.folder.glob(".step-*")):
                if entry.suffix == ".old" and not (name := self.folder / entry.stem[1:]).exists():
                    os.rename(entry, name)
                else:
                    shutil.rmtree(entry)
            for pointer in POINTERS:
                (self.folder / f".{pointer}.pointer").unlink(missing_ok=True)
                shutil.rmtree(self.folder / f".{pointer}.gone", ignore_errors=True)

    def load(self, step: int) -> Checkpoint:
        """Read `step-N`. Raises DataError naming the file that is missing, truncated or corrupt."""
        folder = self.folder / f"step-{step}"
        weights = read_weights(folder / WEIGHTS, remedy=_REMEDY)
        path = folder / TENSORS
        try:
            tensors = torch.load(io.BytesIO(read_bytes(path)), weights_only=True)
        except DataError:
            raise
        except Exception as error:  # torch.load raises many kinds for a corrupt file
            raise DataError(f"{path} is corrupt or truncated ({type(error).__name__}): {_REMEDY}") from error
        return Checkpoint(weights, tensors, read_json(folder / STATE, _REMEDY))


def _step_in(folder: Path) -> int | None:
    """The step of the checkpoint in `folder`, whatever the folder is called; None where it holds none."""
    try:
        return int(read_json(folder / STATE)["progress"]["step"])
    except (DataError, KeyError, TypeError, ValueError):
        return None
