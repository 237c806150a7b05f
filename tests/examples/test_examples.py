from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
    from cvmk.config.loading import load_train_config

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
