"""Weights on their way from the learner to the engines, seen from outside vLLM.

Tensors travel under Hugging Face per-expert names. vLLM fuses some of them (q, k and v; all
experts of a layer) and silently loads garbage when a fused layer arrives in part, so a push holds
whole layers: `complete_layers`. On a CPU they go through the Ray object store and a
shared-memory file ("shm", see shm_transfer.py); on GPUs vLLM's own "nccl" and "ipc" senders drive
the engines through `EngineClient`. This module imports neither torch nor vllm: learners use it.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from safetensors.numpy import save_file

Tensors = Mapping[str, np.ndarray]

FUSED = (
    (re.compile(r"\.[qkv]_proj$"), ".qkv_proj"),
    (re.compile(r"\.experts\..*$"), ".experts"),
    (re.compile(r"\.(gate|up)_proj$"), ".gate_up_proj"),
)


def fused_layer(name: str) -> str:
    """The name of the vLLM layer that the tensor `name` becomes a part of."""
    layer = name.rpartition(".")[0]  # weight and bias of one module are one layer
    if ".experts." in name:
        layer = name  # packed experts ("experts.down_proj") have no ".weight" to cut off
    for pattern, fused in FUSED:
        layer = pattern.sub(fused, layer)
    return layer


def complete_layers(changed: set[str], all_names: Iterable[str]) -> set[str]:
    """`changed` and every other tensor of the fused layers it touches."""
    layers = defaultdict(set)
    for name in all_names:
        layers[fused_layer(name)].add(name)
    unknown = changed - set().union(*layers.values())
    if unknown:
        raise ValueError(f"changed tensors the model does not have: {sorted(unknown)[:3]}")
    return set().union(*(layers[fused_layer(name)] for name in changed))


def tensor_digest(array: np.ndarray) -> str:
    """A short checksum of the bytes of one tensor, equal on both sides of a transfer."""
    return hashlib.blake2b(np.ascontiguousarray(array).view(np.uint8), digest_size=8).hexdigest()


@contextmanager
def shared_files(source: Tensors | str, directory: str) -> Iterator[list[str]]:
    """Safetensors files holding `source`, readable by other processes of this machine.

    A path to a file or to a model folder is passed on as it is; arrays are written to `directory`
    (never the model's own: vLLM globs that) and removed on leaving.
    """
    if isinstance(source, str):
        path = Path(source)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"no safetensors file in {source}")
        yield [str(file) for file in files]
        return
    with TemporaryDirectory(prefix="bar_ray-push-", dir=directory) as folder:
        file = Path(folder) / "weights.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in source.items()}, file)
        yield [str(file)]


class EngineClient:
    """vLLM's `VLLMWeightSyncClient` over RolloutEngine actors, for its "nccl" and "ipc" senders.

    Set `version` before each `send_weights()`. Every call fans out to all engines under one
    deadline; a sender that raises has lost its transfer group and must be built anew.
    """

    def __init__(self, engines: list[ActorHandle], workers_per_engine: int, deadline_s: float):
        self.engines = engines
        self.workers_per_engine = workers_per_engine
        self.deadline_s = deadline_s
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self.engines]
        if "rank_offset" in init_info:  # nccl: the engines' workers follow one another in the group
            for index, info in enumerate(infos):
                info["rank_offset"] += index * self.workers_per_engine
        calls = zip(self.engines, infos, strict=True)
        ray.get([e.init_transfer.remote(info) for e, info in calls], timeout=self.deadline_s)

    def start_weight_update(self) -> None:
        ray.get([e.start_update.remote() for e in self.engines], timeout=self.deadline_s)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        ray.get([e.load_update.remote(update_info) for e in self.engines], timeout=self.deadline_s)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = self.version if weight_version is None else int(weight_version)
        ray.get([e.finish_update.remote(version) for e in self.engines], timeout=self.deadline_s)
