"""examples/huggingface_mamba.py on a model of random weights."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
EXAMPLE = Path(__file__).parents[2] / "examples" / "huggingface_mamba.py"


def language_model() -> Any:
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2)).double()


def test_logits_gradients_and_generation_are_theirs() -> None:
    example = runpy.run_path(str(EXAMPLE), run_name="example")
    theirs, ours = language_model(), example["on_our_kernels"](language_model())
    ids = torch.randint(40, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padded on the left, as for generation
    found = [model(ids, attention_mask=mask, use_cache=False).logits for model in (ours, theirs)]
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)
    for logits in found:
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for (name, mine), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, want.grad, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    told = [model.eval().generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (ours, theirs)]
    assert torch.equal(*told)
    with pytest.raises(ValueError, match="MambaMixer"):
        example["on_our_kernels"](torch.nn.Linear(2, 2))


def test_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--width", "16", "--layers", "1", "--vocabulary", "30", "--length", "8", "--rounds", "1"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("logits differ by ") and float(lines[0].split()[3].rstrip(",")) < 1e-4
    assert [line.split(":")[0] for line in lines[1:]] == ["forward", "training step"] and all("times as fast" in line for line in lines[1:])
