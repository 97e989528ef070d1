"""What workers do not import."""

import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from bar_ray import lean
from bar_ray.tiny.tokenizer import build_tokenizer


def test_workers_start_without_what_they_never_use(tmp_path: Path) -> None:
    """Though they import engines and models only when they make the first."""
    assert all(map(util.find_spec, lean.UNUSED)), "installed, or this shows nothing"
    program = f"""
import sys, types
from bar_ray.stages import start

class Rank:
    ledger = types.SimpleNamespace(close=lambda: None)
    def __init__(self, step):
        import bar_ray.stages.learner
    def loop(self):
        import bar_ray.train.engine, transformers.generation.utils
        return {{"imported": {{*sys.modules}}}}

sys.modules["ranks"] = types.SimpleNamespace(Rank=Rank)
step = types.SimpleNamespace(artifact=types.SimpleNamespace(uri={str(tmp_path / "none")!r}))
found = start._work({{"worker": "ranks:Rank", "steps": [step]}})["imported"]
assert "deepspeed" in found
assert not {set(lean.UNUSED)!r} & {{m for m in found if sys.modules.get(m)}}
import {", ".join(lean.UNUSED)}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reading_a_tokenizer_does_without_them_too(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    program = f"""
import sys
from bar_ray.data import chat
chat.load_tokenizer({str(tmp_path)!r})
assert not {set(lean.UNUSED)!r} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_there_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    there = object()
    monkeypatch.setitem(sys.modules, "mlflow", there)
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    with lean.imports():
        assert sys.modules["mlflow"] is there
        assert sys.modules["sklearn"] is None
    assert sys.modules["mlflow"] is there
    assert "sklearn" not in sys.modules
