"""Weights on their way from the learner to the engines, seen from outside vLLM.

Tensors travel under Hugging Face per-expert names. vLLM fuses some of them (q, k and v; all
experts of a layer) and silently loads garbage when a fused layer arrives in part, so a push holds
whole layers: `complete_layers`. They go through the Ray object store and a shared-memory file of
the engine's machine ("shm", see shm_transfer.py), in the type they are trained in: bfloat16, which
numpy lacks, as two raw bytes. Importing this module imports neither torch nor vllm: the sampler
uses it too.
"""

import hashlib
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bar_ray import storage

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, np.ndarray]
BFLOAT16 = np.dtype("V2")

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


def as_array(tensor: "torch.Tensor") -> np.ndarray:
    """A tensor's values in host memory."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(BFLOAT16)
    return tensor.numpy()


def as_tensor(array: np.ndarray) -> "torch.Tensor":
    """The opposite of `as_array`; shares the array's memory, which is only read."""
    import torch

    array = np.ascontiguousarray(array)
    with warnings.catch_warnings(action="ignore"):  # arrays of the object store cannot be written
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)


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
    from bar_ray.model import tensors

    folder = storage.scratch(os.path.join(directory, f"bar_ray-{os.getuid()}"))
    try:
        file = Path(folder) / "weights.safetensors"
        found = {name: as_tensor(array) for name, array in source.items()}
        with storage.unless_full("hand weights over in", folder):
            tensors.save(file, found)
        yield [str(file)]
    finally:
        storage.discard(folder)
