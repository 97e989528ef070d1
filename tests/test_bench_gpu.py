"""The script for a GPU: tried whole in Triton's interpreter, and what it expects of a card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bar_ray.cost import Shape
from bar_ray.recipe import Learn


def bench(output: Path, *arguments: str) -> tuple[list[dict], str]:
    command = [sys.executable, "-m", "bar_ray.bench.gpu", str(output), *arguments]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads((output / "results.json").read_text())
    assert (output / "results.md").read_text().startswith(found["device"])
    return found["results"], done.stdout


@pytest.mark.slow
def test_the_script_checks_and_times_everything(tmp_path: Path) -> None:
    results, table = bench(tmp_path, "--small")
    checks = [each for each in results if each["what"].startswith("check ")]
    assert len(checks) == 6 and all(0 < each["error"] < 0.05 for each in checks)
    timed = [each for each in results if each not in checks]
    assert len(timed) == 4 + 6 + 4 + 4 and all(each["ms"] > 0 for each in timed)
    assert not any("expected ms" in each for each in timed), "nothing is known of this CPU"
    assert all(each["what"] in table for each in results)


def test_expectations_follow_from_flops_and_bytes(tmp_path: Path) -> None:
    results, _ = bench(tmp_path, "--predict", "H100")
    expected = {each["what"]: each for each in results}
    assert not any("ms" in each for each in results), "nothing was measured"
    bound = expected["expert FFN, 8192 tokens: the bare cuBLAS products"]["expected ms"]
    assert bound == pytest.approx(1e3 * 5 * 2 * 3 * 4096 * 11008 * 8192 / 798e12)
    ours = expected["expert FFN, 8192 tokens: ours"]["expected ms"]
    assert ours == pytest.approx(bound + 1e3 * 17 * 2 * 11008 * 8192 / 3.0e12)
    step = expected["midtrain step, 16 layers of 2x7B, 4096 tokens: kernels"]
    shape = Shape(16, 4096, 32, 32, 128, 11008, 100_352, experts=2, active=2)
    flops = shape.flops(Learn(expert=1, router=1), 4096).total
    mfu = flops * step["expected tokens/s"] / 989e12
    assert step["expected MFU, percent"] == pytest.approx(100 * mfu)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bar_ray.bench.gpu", str(tmp_path)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "--small tries the script on CPU" in done.stderr
