"""The teacher of a run: a finished model, its name, and what is told of it."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cvmk.config import TeacherConfig
from cvmk.errors import DataError
from cvmk.files import read_json
from cvmk.formats import load_model_folder, resolve_model_folder
from cvmk.inference import Translator
from cvmk.nn import CVMTransformer, count_parameters
from cvmk.telemetry.schema import Taught
from cvmk.text.tokenizers import Tokenizer
from cvmk.training.report import REPORT


@dataclass(frozen=True)
class Teacher:
    """A finished model to distil, and a name for its weights."""

    model: CVMTransformer
    tokenizer: Tokenizer
    path: Path
    fingerprint: str

    def translator(self) -> Translator:
        """Translates with its weights."""
        return Translator.of_weights(self.model, self.tokenizer)

    @property
    def weights(self) -> Path:
        """The folder of the weights that teach: inside a run's folder its model, or its best checkpoint, as long as the run is not finished."""
        return resolve_model_folder(self.path)

    @property
    def finished(self) -> bool:
        """Whether the weights in this place stay as they are."""
        return self.weights.parent != self.path / "checkpoints"

    def event(self) -> Taught:
        return Taught(str(self.path), str(self.weights.resolve()), self.fingerprint, self.finished)

    def facts(self) -> dict[str, Any]:
        """What a student's report says of it: path, fingerprint, parameters, and its scores where they are known."""
        facts: dict[str, Any] = {"path": str(self.path), "fingerprint": self.fingerprint, "parameters": count_parameters(self.model)}
        if self.weights.name == "model":  # of a finished run
            with contextlib.suppress(DataError, KeyError, TypeError):  # a damaged report of the teacher must not cost the student
                found = read_json(self.weights.parent / REPORT)
                return facts | {"validation": found["validation"]["scores"], "test": found["test"]["scores"] if found["test"] else None}
        return facts


def load_teacher(path: Path, device: torch.device) -> Teacher:
    """The model in the folder of a model or of a run, in float32, frozen. Raises DataError as `load_model_folder` does."""
    model, tokenizer, _ = load_model_folder(path)
    model = model.float().to(device).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Teacher(model, tokenizer, path, _fingerprint(model))


def named_teacher(config: TeacherConfig | None, device: torch.device) -> Teacher | None:
    """The teacher that the configuration names by path; None where it is to be trained, or where there is none."""
    if config is None or config.path is None:
        return None
    return load_teacher(Path(config.path), device)


def is_trained(folder: Path) -> bool:
    """Whether the teacher's training in `folder` has come to its end; one that diverged is to go on."""
    if not (folder / REPORT).exists():
        return False
    with contextlib.suppress(DataError):
        report = read_json(folder / REPORT)
        return not (isinstance(report, dict) and report.get("diverged"))
    return True  # the report is damaged, and no report is needed to teach


def _fingerprint(model: CVMTransformer) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
