"""Cluster files, offline: Ray's own schema and what it lets pass, and KubeRay's."""

import copy
import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = {"aws": "cluster.yaml", "gcp": "conf/clusters/gcp.yaml"}
MACHINES = {  # vCPUs and GPUs, after cloud.google.com/compute: Ray cannot look them up
    "n2-standard-8": (8, 0),
    "a2-highgpu-8g": (96, 8),
    "g2-standard-48": (48, 4),
}
RAY = importlib.metadata.version("ray")

Config = dict[str, Any]


def read(cloud: str) -> Config:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / FILES[cloud]).read_text()))
    validate_config(config)
    return config


@pytest.fixture(params=sorted(FILES))
def cluster(request: pytest.FixtureRequest) -> Config:
    return read(request.param)


def workers(cluster: Config) -> Iterator[tuple[str, Config]]:
    for name, kind in cluster["available_node_types"].items():
        if name != cluster["head_node_type"]:
            yield name, kind


def head_of(cluster: Config) -> Config:
    return cluster["available_node_types"][cluster["head_node_type"]]


def is_spot(node: Config) -> bool:
    market = node.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or node.get("scheduling", {}).get("provisioningModel") == "SPOT"


def test_limits_make_sense(cluster: Config) -> None:
    for name, kind in workers(cluster):
        assert 0 == kind["min_workers"] <= kind["max_workers"] <= cluster["max_workers"], name
        custom = kind["resources"].keys() - {"CPU", "GPU", "memory"}
        assert len(custom) == 1, f"{name}: elastic training counts nodes by one custom resource"
    assert sum(kind["max_workers"] for _, kind in workers(cluster)) <= cluster["max_workers"]


def test_the_head_is_on_demand_and_takes_no_work(cluster: Config) -> None:
    head = head_of(cluster)
    assert not is_spot(head["node_config"])
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0


def test_workers_are_spot_and_hear_of_their_end(cluster: Config) -> None:
    assert all(is_spot(kind["node_config"]) for _, kind in workers(cluster))
    watch = cluster["worker_start_ray_commands"][-1]
    assert f"~/node/spot_notice.py --cloud={cluster['provider']['type']}" in watch
    assert "export RAY_AUTH_MODE=token" in watch and watch.rstrip().endswith("&)")
    assert (ROOT / cluster["file_mounts"]["~/node"] / "spot_notice.py").is_file()
    assert not [c for c in cluster["head_start_ray_commands"] if "spot_notice" in c]


def test_nodes_install_the_lock_and_no_nightly(cluster: Config) -> None:
    commands = [c for key in cluster if key.endswith("_commands") for c in cluster[key]]
    installs = [c for c in commands if "pip install" in c]
    from_lock = [c for c in installs if "--no-deps -r ~/requirements/gpu.txt" in c]
    others = [c for c in installs if c not in from_lock]
    client = r"~/env/bin/pip install google-api-python-client==[\d.]+"  # what only Google needs
    allowed = client if cluster["provider"]["type"] == "gcp" else "nothing"
    assert from_lock and all(re.fullmatch(allowed, c) for c in others), others
    assert not [c for c in commands if re.search(r"nightly|\.whl|\.dev0|ray-wheels|://", c)]
    pins = (ROOT / "requirements" / "gpu.txt").read_text().splitlines()
    assert f"ray=={RAY}" in pins
    assert any(pin.startswith("boto3==") for pin in pins), "an AWS head launches nodes with it"


def test_strangers_are_kept_out(cluster: Config) -> None:
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        before = command[: command.index("ray start")]
        assert "chmod 600 ~/.ray/auth_token &&" in before
        assert "export RAY_AUTH_MODE=token &&" in before
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "0.0.0.0" not in (ROOT / FILES[cluster["provider"]["type"]]).read_text()
    for name, kind in cluster["available_node_types"].items():
        node = kind["node_config"]
        if cluster["provider"]["type"] == "gcp":
            assert "REPLACE-ME" in node["networkInterfaces"][0]["subnetwork"], name
            [account] = node["serviceAccounts"]
            assert account["email"].startswith("bar-ray-"), "the default one may do anything"
        else:
            assert node["SecurityGroupIds"], f"{name}: Ray's own group opens port 22 to everybody"
            assert node["IamInstanceProfile"], f"{name}: Ray's own role may do anything"
            assert node["MetadataOptions"]["HttpTokens"] == "required", name


def test_google_machines_have_what_their_type_has() -> None:
    cluster = read("gcp")
    for name, kind in cluster["available_node_types"].items():
        cpus, gpus = MACHINES[kind["node_config"]["machineType"]]
        if kind is head_of(cluster):
            continue
        assert (kind["resources"]["CPU"], kind["resources"]["GPU"]) == (cpus, gpus), name
        pool = (kind["resources"].keys() - {"CPU", "GPU"}).pop()
        assert kind["resources"][pool] == gpus, name
        scheduling = kind["node_config"]["scheduling"]
        assert scheduling["onHostMaintenance"] == "TERMINATE", "machines with GPUs cannot move"


def test_cluster_launches_on_a_stand_in_for_aws(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Real instance types, accepted launch requests; refused as long as REPLACE-ME stands there."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws import node_provider
    from ray.autoscaler._private.providers import _NODE_PROVIDERS

    cluster = read("aws")
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


def fill_in_account(cluster: Config, ec2: Any, iam: Any) -> None:
    """What a user brings: image, security group and roles."""
    image = ec2.register_image(Name="mine")["ImageId"]
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="mine", Description="mine", VpcId=vpc)["GroupId"]
    for role in ("bar-ray-head", "bar-ray-worker"):
        iam.create_instance_profile(InstanceProfileName=role)
    for t in cluster["available_node_types"].values():
        t["node_config"].update(ImageId=image, SecurityGroupIds=[group])


# --- Kubernetes ----------------------------------------------------------------------------------


@pytest.fixture
def kuberay() -> Config:
    documents = list(yaml.safe_load_all((ROOT / "conf/clusters/kuberay.yaml").read_text()))
    return {document["kind"]: document for document in documents}


def groups(kuberay: Config) -> list[Config]:
    return kuberay["RayCluster"]["spec"]["workerGroupSpecs"]


def pods(kuberay: Config) -> list[Config]:
    spec = kuberay["RayCluster"]["spec"]
    return [g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_kubernetes_limits_make_sense(kuberay: Config) -> None:
    spec = kuberay["RayCluster"]["spec"]
    assert spec["rayVersion"] == RAY
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in groups(kuberay):
        assert 0 == group["minReplicas"] == group["replicas"] < group["maxReplicas"]
        [pool] = json.loads(json.loads(group["rayStartParams"]["resources"])).items()
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        assert str(pool[1]) == resources["limits"]["nvidia.com/gpu"], pool


def test_kubernetes_keeps_strangers_out(kuberay: Config) -> None:
    spec = kuberay["RayCluster"]["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    [policy] = kuberay["NetworkPolicy"]["spec"]["ingress"]
    assert kuberay["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == {
        "ray.io/cluster": kuberay["RayCluster"]["metadata"]["name"]
    }
    assert all("podSelector" in peer for peer in policy["from"])
    for pod in pods(kuberay):
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert pod["restartPolicy"] == "Never", "autoscaler v2 replaces pods itself"
        [container] = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        name, _, tag = container["image"].rpartition(":")
        assert name and tag and tag not in ("latest", "nightly")


def test_kubernetes_workers_have_time_to_save(kuberay: Config) -> None:
    for pod in pods(kuberay)[1:]:
        environment = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
        drain_s = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 30 <= drain_s < pod["terminationGracePeriodSeconds"]
        assert "nodeSelector" in pod


def test_the_job_runs_on_that_cluster(kuberay: Config) -> None:
    job = yaml.safe_load((ROOT / "conf/clusters/rayjob.yaml").read_text())["spec"]
    assert job["clusterSelector"] == {"ray.io/cluster": kuberay["RayCluster"]["metadata"]["name"]}
    program, recipe = job["entrypoint"].split()[1:3]
    assert (ROOT / program).is_file() and (ROOT / recipe).is_file()
    assert not job.keys() & {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"}, (
        "the driver would leave the head"
    )
    [container] = pods(kuberay)[0]["containers"]
    assert yaml.safe_load(job["runtimeEnvYAML"])["working_dir"] == container["workingDir"]
