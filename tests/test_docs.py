"""The documentation builds, and shows every page there is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs bar_ray[docs]")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    reference = ["-m", "bar_ray.reference", str(tmp_path / "docs" / "reference.md")]
    subprocess.run([sys.executable, *reference], check=True, cwd=ROOT)
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=tmp_path,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    assert "rlvr.grpo.tis_cap" in (tmp_path / "site" / "reference" / "index.html").read_text()


def test_every_page_is_in_the_navigation() -> None:
    shown = yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} | {"reference.md"}
    assert not [page for page in pages if page not in shown]
