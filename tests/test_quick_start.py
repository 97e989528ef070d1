"""The quick start of the documentation, line by line as written; only the recipe is shorter."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
NEEDED = ("bar_ray", "conf", "docs", "jobs", "kernels", "requirements", "Makefile")
ENDLESS = "serve_board.py"


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    lines = [line.partition("  #")[0].rstrip() for block in blocks for line in block.splitlines()]
    return lines


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project with a recipe that takes minutes less: few steps, few test items."""
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)  # whoever runs the tests has installed it
    (tmp_path / "requirements" / "install.sh").write_text("#!/bin/sh\n")
    recipe = tmp_path / "conf" / "tiny.yaml"
    text = re.sub(
        r"\bsteps: (\d+)", lambda found: f"steps: {min(6, int(found[1]))}", recipe.read_text()
    )
    text = re.sub(r"(?m)^  max_tokens: 64", "  max_tokens: 8\n  limit: 4", text)
    recipe.write_text(text.replace("rollout: {max_tokens: 48", "rollout: {max_tokens: 8"))
    return tmp_path


def test_the_quick_start_as_written(project: Path) -> None:
    told = {line: ended(line, project) for line in commands()}
    demo, plan, board, check = told.values()
    assert "bar - base" in demo and (project / "outputs/tiny/report/report.html").exists()
    assert (project / "outputs/tiny/model/config.json").exists()
    assert re.search(r"run +sft code .*", plan) and re.search(r"reuse +sft math", plan)
    assert "http://127.0.0.1:" in board
    assert "no fault" in check and "math_careful" in check


def ended(line: str, folder: Path) -> str:
    """What a command prints; one that would go on is interrupted once it has said where it is."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=folder, **streams) as process:
        if ENDLESS in line:
            assert process.stdout
            first = process.stdout.readline()
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            return first + process.communicate(timeout=60)[0]
        told, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, f"{line}\n{told[-3000:]}"
    return told
