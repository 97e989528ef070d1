"""The quick start as it is written (`docs/index.md`), in a copy of the project with fewer steps."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import urllib.request
import venv
from pathlib import Path

import pytest
from test_end_to_end import SHORT

from bar_ray import config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "index.md").read_text()
NOT_COPIED = (".*", "outputs", "site", "*.egg-info", "__pycache__")
FEW_STARTS = ("stages.midtrain.run.together=2", "stages.sft.run.together=4")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that is set up already, by the packages of this environment."""
    copy = tmp_path_factory.mktemp("fresh") / "bar_ray"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
    short = config.dump(config.load(str(ROOT / "conf" / "tiny.yaml"), [*SHORT, *FEW_STARTS]))
    (copy / "conf" / "tiny.yaml").write_text(short)
    venv.create(copy / ".venv", symlinks=True)
    [packages] = (copy / ".venv" / "lib").glob("python*/site-packages")
    here = sysconfig.get_path("purelib")
    (packages / "these.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    script = (copy / "requirements" / "install.sh").read_text()
    kind = "gpu" if shutil.which("nvidia-smi") else "cpu"
    stamp = re.search(r"^wanted\(\) \{\n.*?^\}", script, re.MULTILINE | re.DOTALL)[0]
    wanted = f"lock=requirements/{kind}.txt\n{stamp}\nwanted"
    made = subprocess.run(["bash", "-c", wanted], cwd=copy, capture_output=True, check=True)
    (copy / ".venv" / ".installed").write_bytes(made.stdout)
    return copy


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]


def environment(project: Path) -> dict[str, str]:
    """Without what `make test ARGS=...` hands down to a `make` within."""
    kept = {n: v for n, v in os.environ.items() if n not in ("ARGS", "MAKEFLAGS", "MAKELEVEL")}
    return {**kept, "PYTHONPATH": str(project)}


def run(line: str, project: Path) -> str:
    done = subprocess.run(
        line, shell=True, cwd=project, env=environment(project), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.late
def test_every_command_does_what_the_page_says(project: Path) -> None:
    demo, plan, board, check = commands()
    shown = run(demo, project)
    assert "setup:" not in shown, "it was set up already"
    assert re.search(r"^bar +\d", shown, re.MULTILINE) and "model  " in shown
    for place in re.findall(r"^\| `(outputs/\S+)` \|", PAGE, re.MULTILINE):
        assert (project / place).exists(), f"the page names {place}"
    assert re.search(r"\b[1-9]\d* to run, [1-9]\d* reused", run(plan, project))
    assert "no fault" in run(check, project)

    serving = subprocess.Popen(
        shlex.split(board), cwd=project, env=environment(project), stdout=subprocess.PIPE, text=True
    )
    try:
        url = next(m[0] for line in serving.stdout if (m := re.search(r"http://\S+/", line)))
        with urllib.request.urlopen(url) as answer:
            assert "rlvr" in answer.read().decode()
    finally:
        serving.send_signal(signal.SIGINT)
        assert serving.wait(60) in (0, -signal.SIGINT, 130)
