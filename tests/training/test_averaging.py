"""The mean of the last weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cvmk.errors import DataError
from cvmk.training.averaging import WeightHistory


class Model(torch.nn.Module):
    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2, 3), value, dtype=dtype))
        self.register_buffer("count", torch.tensor([value], dtype=torch.float64))


def filled(folder: Path, size: int, values: dict[int, float], dtype: torch.dtype = torch.float32) -> WeightHistory:
    history = WeightHistory(folder, size)
    for step, value in values.items():
        history.add(step, Model(value, dtype))  # type: ignore[arg-type]
    return history


def test_the_mean_of_the_last_ones(tmp_path: Path) -> None:
    history = filled(tmp_path, 3, {5: 100.0, 10: 1.0, 15: 2.0, 100: 6.0})
    assert history.steps() == [10, 15, 100], "by number, not by name"
    mean = history.mean()
    assert mean is not None and mean["weight"].tolist() == [[3.0] * 3] * 2 and mean["weight"].dtype == torch.float32
    assert mean["count"].item() == 3.0
    assert WeightHistory(tmp_path, 3).steps() == [10, 15, 100], "another process goes on with it"


def test_sums_are_exact_to_the_dtype(tmp_path: Path) -> None:
    """bfloat16 has 8 bits: 256 + 1 is lost in it, the mean of 256 and 258 is not."""
    mean = filled(tmp_path, 4, {1: 256.0, 2: 258.0, 3: 256.0, 4: 258.0}, torch.bfloat16).mean()
    assert mean is not None and mean["weight"].dtype == torch.bfloat16
    assert mean["weight"].eq(torch.tensor(257.0).bfloat16()).all()
    tiny = filled(tmp_path / "float32", 2, {1: 1.0, 2: 1.0 + 2**-23}).mean()
    assert tiny is not None and float(tiny["weight"][0, 0]) in (1.0, 1.0 + 2**-23)


@pytest.mark.parametrize(("size", "values"), [(1, {1: 1.0, 2: 2.0}), (0, {1: 1.0, 2: 2.0}), (5, {1: 1.0}), (5, {})])
def test_no_mean_of_fewer_than_two(tmp_path: Path, size: int, values: dict[int, float]) -> None:
    history = filled(tmp_path / "average", size, values)
    assert history.mean() is None
    assert size >= 2 or not (tmp_path / "average").exists(), "what is not wanted is not written"


def test_after_a_rollback_later_ones_did_not_happen(tmp_path: Path) -> None:
    history = filled(tmp_path, 3, {10: 1.0, 20: 3.0, 30: 100.0})
    history.drop_after(20)
    history.drop_after(20)
    assert history.steps() == [10, 20]
    mean = history.mean()
    assert mean is not None and mean["weight"][0, 0] == 2.0


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    history = filled(tmp_path, 2, {10: 1.0, 20: 3.0})
    history.add(20, Model(5.0))  # type: ignore[arg-type]
    mean = history.mean()
    assert history.steps() == [10, 20] and mean is not None and mean["weight"][0, 0] == 3.0


def test_damage_is_named(tmp_path: Path) -> None:
    history = filled(tmp_path, 2, {10: 1.0, 20: 3.0})
    (tmp_path / "step-10.safetensors").write_bytes(b"\x10")
    with pytest.raises(DataError, match=r"step-10\.safetensors.*remove it: the average is then one of fewer weights"):
        history.mean()
