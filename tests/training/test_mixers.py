"""Models of other mixers than attention are trained, stopped, resumed, saved and used."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import events, train

from cvmk.errors import ConfigError
from cvmk.inference import Translator
from cvmk.training.trainer import Trainer


class Stopped(Exception):
    """The run ended here."""


@pytest.mark.parametrize(("encoder", "decoder"), [("S", "S"), ("MA", "M"), ("2A", "2S"), ("RW", "HR"), ("H", "WA")])
def test_trains_and_resumes_bit_for_bit(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str, decoder: str) -> None:
    pattern = [f"model.encoder_mixers={encoder}", f"model.decoder_mixers={decoder}", "model.encoder_layers=2", "model.decoder_layers=2"]
    options = [*pattern, "model.positions=none", "validation.max_sentences=5"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(config, *options, f"run.folder={straight}")
    losses = [event["loss"] for event in events(straight, "step")]
    assert losses[-1] < losses[0] - 0.3

    def stop(trainer: Trainer) -> None:
        if trainer.progress.step == 25:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        train(config, *options, f"run.folder={stopped}", on_step=stop, monkeypatch=patch)
    train(config, *options, f"run.folder={stopped}", resume=True)
    assert events(stopped, "resumed")[0]["step"] == 20
    assert (straight / "model" / "model.safetensors").read_bytes() == (stopped / "model" / "model.safetensors").read_bytes()

    translator = Translator(straight / "model")
    for beams in (1, 2):
        assert isinstance(translator.translate(["Good morning."], beam_size=beams)[0].text, str)
    reasons = {answer.engine: answer.reasons for answer in translator.explain()}
    assert reasons["torch"] == ()
    if not {*"2RWH"} & {*encoder + decoder}:
        assert not any("mixers" in reason for reason in reasons["native"])
        return
    assert any("the native engine has attention" in reason for reason in reasons["native"])
    with pytest.raises(ConfigError, match="the model has the mixers .*native engine has attention"):
        Translator(straight / "model", engine="native")
