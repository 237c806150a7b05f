from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs import command
from small_models import make_model, tokenizer

from cvmk.config.loading import load_config, load_train_config
from cvmk.config.serve import ServeConfig
from cvmk.formats import save_model_folder
from cvmk.inference import Translator

__all__ = ["make_model", "tokenizer"]
ROOT = Path(__file__).parents[2]


def test_embedding_an_op() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "embed_in_pytorch.py")], capture_output=True, text=True, timeout=100, check=True)
    difference = re.search(r"differ by (\S+)", done.stdout)
    assert difference and float(difference[1]) < 1e-5
    assert ": chosen" in done.stdout


def test_the_readme_s_ten_lines() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.split("## An operator in ten lines")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    code = code.replace("torch.compile(ops.flash_attention)", "ops.flash_attention")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert ": chosen" in done.stdout


def test_the_readme_s_configuration_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(text.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    config = load_train_config(path)
    assert config.teacher is not None and config.distillation.sequence_level.enabled


def test_the_readme_s_commands_are_those_of_ci() -> None:
    readme, ci = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -c constraints.txt '.[test]' && pytest" in readme
    assert re.search(r"pip install .*-c constraints\.txt '\.\[test\]'", ci) and re.search(r"^pytest\npytest -m exhaustive$", ci, re.MULTILINE)


def test_quantising_a_module() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "quantize_in_pytorch.py")], capture_output=True, text=True, timeout=100, check=True)
    found = re.findall(r"(w\S+): (\S+) of the size, relative error (\S+)", done.stdout)
    assert [scheme for scheme, _, _ in found] == ["w8a8", "w4a16", "w4a8"] and all(float(size) < 0.27 and 0 < float(error) < 0.2 for _, size, error in found)


def test_serving_the_quickstart(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> None:
    """`cvmk serve examples/serve.toml` and `cvmk stream`, over a model of random weights where the quickstart's would be."""
    path = ROOT / "examples" / "serve.toml"
    config = load_config(ServeConfig, path)
    (served,) = config.models.values()
    assert served.path == load_train_config(ROOT / "examples" / "quickstart.toml").run.folder
    commented = re.sub(r"^# (?=\[|\w+ = )", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (tmp_path / "all.toml").write_text(commented, encoding="utf-8")
    assert load_config(ServeConfig, tmp_path / "all.toml").security.keys == "keys"  # what stands in comments is right, too

    folder = tmp_path / served.path / "model"
    folder.parent.mkdir(parents=True)
    save_model_folder(folder, make_model(tokenizer.vocab_size, sharpness=3.0), tokenizer, "", {"languages": {"source": "en", "target": "de"}})
    server = subprocess.Popen(command("serve", path, "--set", "server.port=0"), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = re.fullmatch(r"cvmk: serving quickstart at (127\.0\.0\.1:\d+)\n", server.stderr.readline())
        assert said
        done = subprocess.run(command("stream", "--server", said[1]), input="a man rides\n", capture_output=True, text=True, timeout=60, cwd=tmp_path)
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    expected = Translator(folder).translate(["a man rides"])[0].text
    assert _letters(done.stdout) == _letters(expected) != ""
    assert server.returncode == 0


def _letters(text: str) -> str:
    """Without white space and what a terminal is not shown: random weights say such things."""
    return "".join(letter for letter in text if letter.isprintable() and not letter.isspace())
