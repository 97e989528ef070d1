"""What workers do not import."""

import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from bar_ray import lean
from bar_ray.tiny.tokenizer import build_tokenizer


def test_workers_start_without_what_they_never_use() -> None:
    assert all(map(util.find_spec, lean.UNUSED)), "installed, or this shows nothing"
    program = f"""
import sys
from bar_ray import lean
with lean.imports():
    import bar_ray.stages.learner, bar_ray.train.engine, transformers.generation.utils
assert "deepspeed" in sys.modules
assert not {set(lean.UNUSED)!r} & sys.modules.keys()
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
