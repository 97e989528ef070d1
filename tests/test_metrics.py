"""A real Prometheus scrapes a run's metrics; every panel of the dashboards has an answer."""

import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import yaml

from bar_ray.board import grafana
from bar_ray.cluster.exporter import GAUGES
from bar_ray.cluster.journal import Journal

INTERVAL = "RAY_metrics_report_interval_ms"


def test_dashboards_are_whole(tmp_path: Path) -> None:
    files = grafana.write(tmp_path)
    assert {file.stem for file in files} == {*grafana.DASHBOARDS}
    for file in files:
        found = json.loads(file.read_text())
        ids = [panel["id"] for panel in found["panels"]]
        assert len({*ids}) == len(ids) and found["uid"] == file.stem
        taken: set[tuple[int, int]] = set()
        for panel in found["panels"]:
            place = panel["gridPos"]
            cells = {(x, place["y"]) for x in range(place["x"], place["x"] + place["w"])}
            assert not cells & taken and place["x"] + place["w"] <= grafana.COLUMNS
            taken |= cells
            assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])
    exported = {f"ray_bar_ray_{name}" for name, *_ in GAUGES.values()}
    asked = "\n".join(grafana.queries())
    assert sum(name in asked for name in exported) > 12


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program: $PROMETHEUS, one on the path, or Debian's, unpacked without installing it."""
    if found := os.environ.get("PROMETHEUS") or shutil.which("prometheus"):
        return found
    if shutil.which("apt-get") is None:
        pytest.skip("there is no prometheus: set $PROMETHEUS")
    folder = tmp_path_factory.mktemp("prometheus")
    done = subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, capture_output=True)
    packages = list(folder.glob("*.deb"))
    if done.returncode or not packages:
        pytest.skip(f"apt-get cannot download prometheus: {done.stderr.decode()[-200:]}")
    subprocess.run(["dpkg-deb", "-x", packages[0], folder / "x"], check=True)
    return str(folder / "x" / "usr" / "bin" / "prometheus")


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A Ray head whose agent exports every second; its session's folder."""
    os.environ[INTERVAL] = "1000"
    ray.init("local", num_cpus=1, include_dashboard=True, log_to_driver=False)
    yield ray.worker.global_worker.node.get_session_dir_path()
    ray.shutdown()
    del os.environ[INTERVAL]


@pytest.mark.slow
def test_prometheus_answers_every_panel(
    prometheus: str, head: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    journal = Journal.remote(str(tmp_path / "store"), "r1")
    who = {"verb": "rlvr", "name": "math", "fingerprint": "f", "steps": 90}
    numbers = {name: 0.5 for name in GAUGES if name not in ("step", "steps")}
    view = {"total": {"CPU": 2.0}, "free": {"CPU": 1.0}, "steps": []}
    port = free_port()
    (tmp_path / "prometheus.yml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s"},
                "scrape_configs": [
                    {
                        "job_name": "ray",
                        "file_sd_configs": [
                            {
                                "files": [f"{head}/prom_metrics_service_discovery.json"],
                                "refresh_interval": "1s",
                            }
                        ],
                    }
                ],
            }
        )
    )
    server = subprocess.Popen(
        [
            prometheus,
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        unanswered = grafana.queries()
        deadline, step = time.monotonic() + 120, 0
        while unanswered and time.monotonic() < deadline:
            step += 1
            ray.get(journal.metrics.remote({**who, "step": step, **numbers, "seconds": 2.0}))
            ray.get(journal.pool.remote(view))
            journal.event.remote("checkpoint", **who)
            time.sleep(2)
            unanswered = [query for query in unanswered if not asked(port, query)]
        assert not unanswered, "panels that show nothing"
        [pushed] = asked(port, 'ray_bar_ray_weight_push_bytes{run="r1"}')
        assert float(pushed["value"][1]) == 0.5e6
        assert {"run", "expert", "stage"} <= pushed["metric"].keys()
    finally:
        server.terminate()
        server.wait()
        ray.get(journal.close.remote())
    tool = Path(prometheus).with_name("promtool")
    rules = [{"record": f"panel:{n}", "expr": query} for n, query in enumerate(grafana.queries())]
    groups = {"groups": [{"name": "panels", "rules": rules}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(groups))
    subprocess.run([tool, "check", "rules", tmp_path / "rules.yml"], check=True)


def asked(port: int, query: str) -> list[dict]:
    """What Prometheus answers now; nothing while it starts."""
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]["result"]
    except OSError:
        return []
