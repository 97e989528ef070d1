"""Weights on their way from the learner to the engines, seen from outside vLLM.

Tensors travel under Hugging Face per-expert names. vLLM fuses some of them (q, k and v; all
experts of a layer) and silently loads garbage when a fused layer arrives in part, so a push holds
whole layers: `complete_layers`. They go through the Ray object store and a shared-memory file of
the engine's machine ("shm", see shm_transfer.py). This module imports neither torch nor vllm:
learners use it.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
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
