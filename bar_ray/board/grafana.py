"""Grafana dashboards of runs, from one table of panels; Ray's Grafana takes them as they are.

Ray writes its own dashboards to `<session>/metrics/grafana/dashboards`, and Grafana looks there
for more: a run on the head puts these beside them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 41  # of Grafana 11 and later
COLUMNS, HEIGHT = 24, 8
RUN = 'run=~"$run"'
STAGE = f'{RUN},expert=~"$expert",stage=~"$stage"'
# Ray adds labels of its own (the worker that set a gauge, for one): of all of them, one value.
BY = "max by (run, expert, stage)"


@dataclass(frozen=True)
class Panel:
    """A chart: its queries with what their lines are called, and Grafana's unit."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8


def gauge(title: str, metric: str, unit: str = "short", width: int = 8) -> Panel:
    """A metric of stages at work, a line for each."""
    query = f"{BY} (ray_bar_ray_{metric}{{{STAGE}}})"
    return Panel(title, ((query, "{{expert}} {{stage}}"),), unit, width=width)


def counted(metric: str, by: str, span: str) -> str:
    return f"sum by ({by}) (increase(ray_bar_ray_{metric}{{{RUN}}}[{span}]))"


def pool(title: str, state: str) -> Panel:
    query = f'max by (run, resource) (ray_bar_ray_pool_resources{{{RUN},state="{state}"}})'
    return Panel(title, ((query, "{{resource}}"),), width=12)


DASHBOARDS: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "bar-ray-experts": (
        "bar_ray: experts",
        (
            Panel(
                "Progress",
                (
                    (
                        f"{BY} (ray_bar_ray_step{{{STAGE}}}) / {BY} (ray_bar_ray_steps{{{STAGE}}})",
                        "{{expert}} {{stage}}",
                    ),
                ),
                "percentunit",
                width=12,
            ),
            gauge("Time left", "eta_seconds", "s", 12),
            gauge("Loss", "loss_nats"),
            gauge("Mean reward of rollouts", "reward_ratio", "percentunit"),
            gauge("Gradient norm", "gradient_norm"),
            gauge("Tokens per second", "tokens_per_second"),
            Panel(
                "Tokens learned from",
                ((f"sum by (expert, stage) (ray_bar_ray_tokens_total{{{STAGE}}})", "{{expert}}"),),
            ),
            Panel(
                "Optimizer steps per minute",
                (
                    (
                        "60 * sum by (expert, stage) "
                        f"(rate(ray_bar_ray_optimizer_steps_total{{{STAGE}}}[2m]))",
                        "{{expert}} {{stage}}",
                    ),
                ),
            ),
        ),
    ),
    "bar-ray-rlvr": (
        "bar_ray: RLVR",
        (
            gauge("Mean reward", "reward_ratio", "percentunit"),
            gauge("Entropy", "entropy_nats"),
            gauge("Learner/engine gap", "engine_gap_nats"),
            gauge("Staleness of rollouts", "staleness_steps"),
            gauge("Completions cut", "truncated_ratio", "percentunit"),
            gauge("Groups without signal", "zero_variance_ratio", "percentunit"),
            gauge("Engines idle", "engines_idle_ratio", "percentunit"),
            gauge("Learner waits for rollouts", "rollout_wait_seconds", "s"),
            gauge("Weight push", "weight_push_seconds", "s"),
            gauge("Bytes of a weight push", "weight_push_bytes", "bytes"),
        ),
    ),
    "bar-ray-cluster": (
        "bar_ray: the pool and faults",
        (
            pool("Resources held", "held"),
            pool("Resources free", "free"),
            Panel("Events", ((counted("events_total", "event", "5m"), "{{event}}"),), width=24),
        ),
    ),
}


def dashboard(uid: str) -> dict[str, Any]:
    """The JSON of one, as Grafana exports it."""
    title, panels = DASHBOARDS[uid]
    return {
        "uid": uid,
        "title": title,
        "tags": ["bar_ray"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), *map(_variable, ("run", "expert", "stage"))]},
        "panels": list(_placed(panels)),
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "hide": 2}


def _variable(label: str) -> dict[str, Any]:
    """A choice among the values of a label."""
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": f"label_values(ray_bar_ray_step, {label})", "refId": label},
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 2 if label == "run" else 1,
    }


def _placed(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Panels from left to right, line by line."""
    found, x, y = [], 0, 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > COLUMNS:
            x, y = 0, y + HEIGHT
        place = {"x": x, "y": y, "w": panel.width, "h": HEIGHT}
        found.append(
            {
                **{"id": number, "title": panel.title, "type": panel.kind, "gridPos": place},
                "datasource": {"type": "prometheus", "uid": "${datasource}"},
                "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
                "targets": [
                    {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend}
                    for i, (query, legend) in enumerate(panel.queries)
                ],
            }
        )
        x += panel.width
    return found


def write(folder: str | Path) -> list[Path]:
    """All dashboards as files."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    found = []
    for uid in DASHBOARDS:
        found.append(Path(folder, f"{uid}.json"))
        found[-1].write_text(json.dumps(dashboard(uid), indent=1) + "\n")
    return found


def queries() -> list[str]:
    """Every query of every panel, for all runs, experts and stages."""
    found = [q for _, panels in DASHBOARDS.values() for panel in panels for q, _ in panel.queries]
    for name in ("run", "expert", "stage"):
        found = [query.replace(f"${name}", ".*") for query in found]
    return found
