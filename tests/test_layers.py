"""Who may import whom: the table of CONTRIBUTING.md, enforced on every import statement of the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cvmk"


def table() -> dict[str, set[str]]:
    """Layer -> layers that it may import, from the table under "The house"; "all above" is every row before it."""
    allowed: dict[str, set[str]] = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        names = re.findall(r"`cvmk\.(\w+)`", cells[0])
        if not line.startswith("| `cvmk") or len(cells) != 3:
            continue
        may = set(allowed) if cells[2] == "all above" else set() if cells[2] == "nothing" else {name.strip() for name in cells[2].split(",")}
        for name in names:
            allowed[name] = may | {name} | set(names)
    return allowed


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> list[tuple[str, int]]:
    """Modules of cvmk that a file imports anywhere, with the line; `from cvmk import x` counts as cvmk.x."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"cvmk.{alias.name}" for alias in node.names] if node.module == "cvmk" else [node.module or ""]
            found += [(name, node.lineno) for name in names]
    return [(name, line) for name, line in found if name == "cvmk" or name.startswith("cvmk.")]


def test_every_layer_stands_in_the_table() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__", "__main__"} == set(table())


def test_imports_go_one_way() -> None:
    allowed, wrong = table(), []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        for name, line in imports(path):
            target = layer(name)
            if target and target not in allowed[own] and target != "__version__":
                wrong.append(f"{path.relative_to(ROOT)}:{line}: cvmk.{own} must not import cvmk.{target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "import cvmk",
        "import cvmk.config, cvmk.config.loading, cvmk.telemetry, cvmk.hardware, cvmk.libraries",
        "import cvmk.text.corpus, cvmk.text.tokenizers, cvmk.text.cache, cvmk.text.phrasebook",
        "import cvmk.serving.auth, cvmk.serving.detection, cvmk.serving.limits",
        "import cvmk.formats.folder, cvmk.formats.tensors, cvmk.inference.engines, cvmk.inference.scheduler, cvmk.validation.metrics",
        "from cvmk.cli import main; main(['train', '--explain-config'])",
        f"from cvmk.cli import main; main(['train', {str(ROOT / 'examples/quickstart.toml')!r}, '--check'])",
        f"from cvmk.cli import main; main(['search', {str(ROOT / 'examples/search.toml')!r}, '--check'])",
        "from cvmk.cli import main; main(['validate', 'model', '--source', 'nowhere', '--reference', 'nowhere'])",
        "import cvmk.report.contents, cvmk.report.html; from cvmk.cli import main; main(['report', 'nowhere'])",
    ],
)
def test_torch_is_imported_only_where_it_is_needed(code: str, tmp_path: Path) -> None:
    seen = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('torch' in sys.modules)"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert seen.stdout.splitlines()[-1] == "False"
