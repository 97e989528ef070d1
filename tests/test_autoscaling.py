"""Ray's autoscaler (v2) with real raylets: machines come for training and for RLVR, and go."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID as HEAD_ID
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util import get_node_ip_address

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider"
KINDS = ("train_pool", "rollout_pool")
COMMANDS = (
    *("head_start_ray", "setup", "head_setup"),
    *("worker_setup", "worker_start_ray", "initialization"),
)


def settings(address: str) -> dict[str, object]:
    """What `ray up` would give the autoscaler: a head for light work, and two kinds of workers."""
    kinds = {"ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0}}
    for name in KINDS:
        resources = {"CPU": 2, name: 2}
        kinds[name] = {"resources": resources, "node_config": {}, "min_workers": 0}
        kinds[name]["max_workers"] = 2
    return {
        **{"cluster_name": "fake", "max_workers": 4, "idle_timeout_minutes": 0.1},
        **{"upscaling_speed": 1.0, "head_node_type": "ray.head.default", "auth": {}},
        **{"file_mounts": {}, "file_mounts_sync_continuously": False, "cluster_synced_files": []},
        **{"rsync_exclude": [], "rsync_filter": []},
        **{f"{name}_commands": [] for name in COMMANDS},
        "provider": {
            **{"type": "external", "module": f"{PROVIDER}.FakeMultiNodeProvider"},
            **{"gcs_address": address, "head_node_id": HEAD_ID, "launch_multiple": True},
            **{"disable_node_updaters": True, "disable_launch_config_check": True},
        },
        "available_node_types": kinds,
    }


@pytest.fixture
def address(free_port: Callable[[], int]) -> Iterator[str]:
    """A head with an autoscaler and no other node; everything ends with it."""
    port, folder = free_port(), Path("/tmp", f"bar_ray_scale_{os.getpid()}")
    folder.mkdir()
    address, log = f"{get_node_ip_address()}:{port}", folder / "log"
    (folder / "settings.json").write_text(json.dumps(settings(address)))
    env = {
        **os.environ,
        **{"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"},
        **{"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID},
        **{"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block"]
    command += [f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2"]
    command += [f"--autoscaling-config={folder}/settings.json", "--object-store-memory=200000000"]
    command += [f"--dashboard-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    with open(log, "w") as sink:
        head = subprocess.Popen(command, env=env, stdout=sink, stderr=sink)
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield address
    finally:
        # The machines are not children of their autoscaler.
        ours = [p for p in psutil.process_iter(["cmdline"]) if f"{folder}/" in _words(p)]
        for process in {*psutil.Process(head.pid).children(recursive=True), *ours}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.kill()
        head.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def _words(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or [])


def nodes(address: str) -> list[str]:
    """The kinds of the nodes that are up, but the head."""
    status = get_cluster_status(address)
    up = [*status.active_nodes, *status.idle_nodes]
    return sorted(n.ray_node_type_name for n in up if n.ray_node_type_name in KINDS)


DRIVE = """
import sys
from bar_ray import config, pipeline
from bar_ray.cluster import session
recipe = config.load("conf/tiny.yaml", sys.argv[1:])
session.drive(recipe, [pipeline.build(recipe).stages["code"]["rlvr"]])
"""
SMALL = (
    *("tiny.pretrain.steps=60", "tiny.post_train.steps=20", "experts.code.midtrain=null"),
    *("experts.code.sft=null", "experts.code.rlvr.held_out=''"),
    *("stages.rlvr.steps=2", "stages.rlvr.batch_size=4", "stages.rlvr.rollout.max_tokens=12"),
)


def test_machines_come_for_training_and_for_rollouts_and_go(address: str, tmp_path: Path) -> None:
    where = [f"storage={tmp_path / 'store'}", f"cluster.address={address}"]
    for stage in ("tiny.pretrain", "tiny.post_train", "stages.rlvr"):
        where += [f"{stage}.run.resources.train_pool=1", f"{stage}.run.cpus_per_worker=1"]
    where += ["tiny.pretrain.run.num_workers=3", "tiny.pretrain.run.min_workers=1"]
    where += ["stages.rlvr.rollout.resources.rollout_pool=1"]
    assert nodes(address) == []
    seen: set[tuple[str, ...]] = set()
    with subprocess.Popen([sys.executable, "-c", DRIVE, *where, *SMALL]) as driver:
        while driver.poll() is None:
            seen.add(tuple(nodes(address)))
            time.sleep(0.5)
        assert driver.returncode == 0
    assert ("train_pool", "train_pool") in seen, "three workers, two on a machine"
    assert any("rollout_pool" in kinds for kinds in seen)
    assert all(kinds.count("rollout_pool") <= 1 for kinds in seen), "one engine needs one machine"
    deadline = time.monotonic() + 90
    while nodes(address):
        assert time.monotonic() < deadline, nodes(address)
        time.sleep(1)
