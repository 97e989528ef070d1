"""What workers do not import."""

import subprocess
import sys
from importlib import util

import pytest

from bar_ray import lean


@pytest.mark.parametrize("module", ["bar_ray.stages.learner", "bar_ray.data.chat"])
def test_workers_start_without_what_they_never_use(module: str) -> None:
    assert all(map(util.find_spec, lean.UNUSED)), "installed, or this shows nothing"
    program = f"""
import importlib, sys
from bar_ray import lean
with lean.imports():
    importlib.import_module("{module}")
    import bar_ray.train.engine, transformers, transformers.generation.utils
assert "deepspeed" in sys.modules
assert not {set(lean.UNUSED)!r} & sys.modules.keys()
import {", ".join(lean.UNUSED)}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_there_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    there = object()
    monkeypatch.setitem(sys.modules, "mlflow", there)
    with lean.imports():
        assert sys.modules["mlflow"] is there
        assert sys.modules["sklearn"] is None
    assert sys.modules["mlflow"] is there
    assert sys.modules.get("sklearn", there) is not None
