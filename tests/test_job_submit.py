"""`ray job submit` against a local head with token authentication on."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[str]:
    """The dashboard URL of a head of our own, ended with everything it started."""
    folder, url = tmp_path_factory.mktemp("ray"), f"http://127.0.0.1:{(port := free_port())}"
    short = Path("/tmp", f"bar_ray_head_{os.getpid()}")  # socket paths must be short
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={short}"]
    ports = [f"--port={free_port()}", f"--dashboard-port={port}", "--dashboard-agent-listen-port=0"]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*command, *ports], env=env, stdout=log, stderr=log)
    try:
        wait_for(url, folder / "log")
        yield url
    finally:
        started = [process, *psutil.Process(process.pid).children(recursive=True)]
        for one in started:
            one.send_signal(signal.SIGKILL)
        psutil.wait_procs([p for p in started if isinstance(p, psutil.Process)], timeout=20)
        process.wait(20)
        shutil.rmtree(short, ignore_errors=True)


def wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            request = urllib.request.Request(
                f"{url}/api/version",
                headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"},
            )
            urllib.request.urlopen(request, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def submit(url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [RAY, "job", "submit", f"--address={url}", "--working-dir", ".", "--"]
    job = ["python", "jobs/train_all.py", "conf/tiny.yaml", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run([*command, *job], env=env, capture_output=True, text=True, timeout=300)


def test_the_head_refuses_a_wrong_token(head: str) -> None:
    refused = submit(head, "--plan", RAY_AUTH_TOKEN="not-the-token")
    assert refused.returncode != 0 and "never ran" not in refused.stdout


def test_a_submitted_job_plans_and_fails_like_a_local_one(head: str, tmp_path: Path) -> None:
    planned = submit(head, "--plan", f"storage={tmp_path}/store")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert " to run, 0 reused" in planned.stdout
    mistake = submit(head, "sed=1")
    assert mistake.returncode != 0 and "Did you mean: 'seed'" in mistake.stdout


def test_a_submitted_job_runs_on_the_cluster_it_was_submitted_to(head: str, tmp_path: Path) -> None:
    """A small part of the graph, run by Ray workers that get the code from the working dir."""
    command = [RAY, "job", "submit", f"--address={head}", "--working-dir", ".", "--"]
    code = (
        "from bar_ray import builder, config; from bar_ray.cluster import session; "
        f"recipe = config.load('conf/tiny.yaml', ['storage={tmp_path}/store']); "
        "graph = builder.Builder(recipe); graph.dense(); "
        "session.drive(recipe, [graph.world, graph.tokenise('safety_sft', 'messages', 64)])"
    )
    done = subprocess.run(
        [*command, "python", "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 to run, 0 reused" in done.stdout and "(3/3)" in done.stdout
