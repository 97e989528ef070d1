"""Imports point downward only: a file may use what stands on an earlier line of LAYERS."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

# Bottom to top. A module imports only from earlier lines, or from its own package.
LAYERS = (
    ("L0", "kernels"),
    ("L1", "types recipe log lean categories"),
    ("L1", "families plugin"),
    ("L1", "validate"),
    ("L1", "config storage cost"),
    ("L1", "cli"),
    ("L1", "reference"),
    ("L1", "graph"),
    ("L1", "estimate"),
    ("L2", "model data rewards cluster registry"),
    ("L3", "train"),
    ("L3", "rollout"),  # samples carry the advantages that train defines
    ("L4", "stages"),
    ("L4", "merge route evaluate tiny check"),
    ("L4", "baselines"),
    ("L5", "builder"),
    ("L5", "pipeline"),
    ("L5", "versions"),
    ("L5", "report"),
    ("L5", "bench retention claims"),
    ("L5", "export board"),  # the model card of an export shows the report's scores
    ("L5", "upgrade sweep subset"),
    ("jobs", "jobs"),
)
RANK = {unit: rank for rank, (_, line) in enumerate(LAYERS) for unit in line.split()}
LEVEL = {unit: level for level, line in LAYERS for unit in line.split()}

# Reading a recipe and planning a run must be quick and work on any machine.
LIGHT = {unit for unit, level in LEVEL.items() if level == "L1"}
LIGHT |= {"builder", "pipeline", "versions"}
HEAVY = {"torch", "ray", "transformers", "deepspeed", "vllm", "datasets"}


def sources() -> list[Path]:
    return sorted(p for top in ("kernels", "bar_ray", "jobs") for p in (ROOT / top).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything a file imports, inside functions too."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            source = util.resolve_name(source, package) if node.level else source
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def unit_of(name: str) -> str | None:
    """The entry of LAYERS a dotted name belongs to; None: `bar_ray` itself, or not ours."""
    top, _, rest = name.partition(".")
    if top in ("kernels", "jobs"):
        return top
    return rest.partition(".")[0] or None if top == "bar_ray" else None


def test_every_module_has_a_layer() -> None:
    unknown = {unit_of(module_of(path)) for path in sources()} - RANK.keys() - {None}
    assert not unknown, f"say where {sorted(unknown)} belongs: add it to LAYERS in {__file__}"


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_point_downward(path: Path) -> None:
    me = unit_of(module_of(path))
    wrong = [
        f"line {line}: {LEVEL.get(me, '')} {me} may not import {LEVEL[unit]} {name}"
        for line, name in imports(path)
        if (unit := unit_of(name)) in RANK and unit != me and RANK[unit] >= RANK.get(me, 0)
    ]
    assert not wrong, f"{path.relative_to(ROOT)} (see LAYERS):\n" + "\n".join(wrong)


@pytest.mark.parametrize("unit", sorted(LIGHT))
def test_light_modules_name_nothing_heavy(unit: str) -> None:
    for path in sources():
        if unit_of(module_of(path)) == unit:
            heavy = {name for _, name in imports(path) if name.partition(".")[0] in HEAVY}
            assert not heavy, f"{path.relative_to(ROOT)} imports {sorted(heavy)}"


def test_configuring_and_planning_import_neither_torch_nor_ray() -> None:
    light = [f"bar_ray.{unit}" for unit in LIGHT if util.find_spec(f"bar_ray.{unit}")]
    assert heavy_after_importing(*light) == set()


def test_processes_that_only_direct_others_are_quick_to_start() -> None:
    """The driver, most steps and the sampler: torch and transformers take seconds to import."""
    directing = (
        "cluster.run",
        "cluster.session",
        "rollout.sampler",
        "evaluate.run",
        "evaluate.items",
    )
    directing += ("stages.start", "stages.rlvr", "cluster.process_group")
    assert heavy_after_importing(*(f"bar_ray.{name}" for name in directing)) == {"ray"}


def heavy_after_importing(*names: str) -> set[str]:
    program = f"import sys, {', '.join(names)}; print(*({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_kernels_know_nothing_of_bar_ray() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not [name for _, name in imports(path) if unit_of(name) not in (None, "kernels")]


def test_what_is_imported_is_a_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(*lists: list[str]) -> set[str]:
        return {canonicalize_name(Requirement(text).name) for texts in lists for text in texts}

    declared = names(project["dependencies"], extras["cpu"], extras["gpu"])
    peers = names(extras["bench"])  # what is measured against, by the bench alone
    optional = {"trackers.py": extras["trackers"], "eight_bit.py": extras["eight_bit"]}
    optional |= {"harness.py": extras["eval"]}
    installed = {"mlflow": ["mlflow-skinny"]} | metadata.packages_distributions()
    known = sys.stdlib_module_names | {"bar_ray", "kernels", "jobs"}
    for path in sources():
        for line, name in imports(path):
            top = name.partition(".")[0]
            owners = {canonicalize_name(owner) for owner in installed.get(top, [top])}
            where = f"{path.relative_to(ROOT)}:{line}"
            allowed = declared | (peers if "bench" in path.parts else set())
            allowed |= names(optional.get(path.name, []))
            assert top in known or owners & allowed, f"{where}: {top} is not in pyproject.toml"
