"""Numbers in TensorBoard, W&B and MLflow, read back from what they wrote."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bar_ray.cluster import trackers
from bar_ray.recipe import Tracking

SAID = [("sft/math", 1, {"loss": 2.0, "lr": 0.1}), ("rlvr/math", 1, {"reward": 0.5})]
SAID += [("sft/math", 2, {"loss": 1.5, "lr": 0.05}), ("sft/math", 1, {"loss": 1.9})]  # resumed


def told(name: str, folder: Path, **settings: Any) -> None:
    made = trackers.made(Tracking(trackers=[name], **settings), "r1", str(folder))[name]
    for who, step, numbers in SAID:
        made.log(who, step, numbers)
    made.close()


def test_mlflow_has_a_run_per_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs bar_ray[trackers]")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server needs more than the client
    uri = (tmp_path / "mlruns").as_uri()
    told("mlflow", tmp_path, mlflow_uri=uri, project="bar")
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("bar").experiment_id])
    found = {run.info.run_name: run for run in runs}
    assert found.keys() == {"sft/math r1", "rlvr/math r1"}
    sft = found["sft/math r1"]
    assert sft.data.tags["stage"] == "sft" and sft.data.tags["bar_ray_run"] == "r1"
    assert sft.info.status == "FINISHED"
    history = client.get_metric_history(sft.info.run_id, "loss")
    assert sorted((each.step, each.value) for each in history) == [(1, 1.9), (1, 2.0), (2, 1.5)]


def logged(content: bytes) -> Iterator[bytes]:
    """Records of a log as LevelDB writes it, behind W&B's header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline_has_a_run_per_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs bar_ray[trackers]")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    told("wandb", tmp_path, project="bar")
    found: dict[str, list[dict[str, float]]] = {}
    for file in tmp_path.rglob("*.wandb"):
        name, rows = "", []
        for data in logged(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                name = record.run.display_name
                assert record.run.run_group == "r1" and record.run.project == "bar"
            elif record.WhichOneof("record_type") == "history":
                items = (
                    (i.key or ".".join(i.nested_key), i.value_json) for i in record.history.item
                )
                values = {key: json.loads(value) for key, value in items}
                rows.append({k: v for k, v in values.items() if not k.startswith("_")})
        found[name] = rows
    assert found["rlvr/math r1"] == [{"reward": 0.5, "optimizer_step": 1}]
    assert [row["optimizer_step"] for row in found["sft/math r1"]] == [1, 2, 1]
    assert [row["loss"] for row in found["sft/math r1"]] == [2.0, 1.5, 1.9]


def test_tensorboard_has_a_folder_per_stage(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    told("tensorboard", tmp_path)
    [file] = (tmp_path / "tensorboard" / "rlvr" / "math").iterdir()
    content, at, found = file.read_bytes(), 0, []
    while at < len(content):  # length, its checksum, an event, its checksum
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        found += [(each.tag, event.step, each.simple_value) for each in event.summary.value]
        at += 16 + length
    assert found == [("reward", 1, 0.5)]
