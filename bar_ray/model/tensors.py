"""Tensors on disk: roles by name, lazy reading, streaming writing.

Checkpoints are plain Hugging Face folders of safetensors. Reading maps files into memory and
writing goes tensor by tensor, so no step here ever holds a model. Names are the same for every
family, whatever its files say (`bar_ray.families`):
`model.layers.N.mlp.experts.E.gate_proj.weight` and `model.layers.N.mlp.gate.weight` [E, D].
"""

import contextlib
import functools
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bar_ray import families
from bar_ray.types import UserError
from kernels import average
from kernels.average import Part, Region

SHARD_BYTES = 5 * 2**30
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
ROUTER_ROW = re.compile(r"\.mlp\.gate\.rows\.(\d+)$")
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
WRITTEN = {**DTYPES, torch.uint8: "U8"}  # codes of an optimizer's state too

PART_BYTES = 16 * 2**20  # written by one thread
MOST_THREADS = 4  # one file takes one write at a time

Content = torch.Tensor | Callable[[Part], None]  # of a tensor: itself, or what writes parts of it


def role_of(name: str) -> str:
    """The role of a tensor: embedding, attention, norm, lm_head, anchor, expert, router or adapter.

    Expert 0 and its router row are the anchor. Of a dense model the FFN is the expert. The stacked
    router of a file holds every row and counts as `router`.
    """
    if ".lora_" in name:
        return "adapter"
    if match := EXPERT.search(name) or ROUTER_ROW.search(name):
        if match.group(1) == "0":
            return "anchor"
        return "expert" if ".experts." in name else "router"
    if name.endswith("mlp.gate.weight"):
        return "router"
    if ".mlp." in name:
        return "expert"
    if ".self_attn." in name:
        return "attention"
    if "embed_tokens" in name:
        return "embedding"
    if name.startswith("lm_head"):
        return "lm_head"
    if "norm" in name:
        return "norm"
    raise ValueError(f"no role for tensor {name}")


@dataclass(frozen=True)
class Spec:
    """Type and shape of a tensor that is still to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Checkpoint:
    """A Hugging Face folder, read lazily: names, specs, one tensor at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = self._read_config()
        self._canonical = families.canonical_name(self.config)
        self._files: dict[str, tuple[Any, str]] = {}  # name -> its file, and its name there
        self._opened: list[FileIO] = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                handle = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise UserError(
                    f"{path} is not a whole safetensors file ({error}); copy it again"
                ) from error
            self._files |= {self._canonical(name): (handle, name) for name in handle.keys()}  # noqa: SIM118
        if not self._files:
            raise UserError(f"{self.folder} has no safetensors files, so it is no checkpoint")

    def _read_config(self) -> dict:
        try:
            return json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} has no readable config.json: {error}") from error

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._files:
            raise UserError(f"{self.folder} has no tensor {name}")
        handle, stored = self._files[name]
        return handle.get_tensor(stored)

    def region(self, name: str) -> Region:
        """Where the bytes of a tensor lie."""
        if name not in self._regions:
            raise UserError(f"{self.folder} has no tensor {name}")
        return self._regions[name]

    @functools.cached_property
    def _regions(self) -> dict[str, Region]:
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as the checkpoint)
            self._opened.append(file)
            size = struct.unpack("<Q", file.read(8))[0]
            for name, about in json.loads(file.read(size)).items():
                if name != "__metadata__":
                    start, end = about["data_offsets"]
                    region = Region(file.fileno(), 8 + size + start, end - start)
                    found[self._canonical(name)] = region
        return found

    def spec(self, name: str) -> Spec:
        handle, stored = self._files[name]
        view = handle.get_slice(stored)
        dtype = {v: k for k, v in DTYPES.items()}.get(view.get_dtype())
        if dtype is None:
            raise UserError(f"{self.folder}: {name} is {view.get_dtype()}; use F32, BF16 or F16")
        return Spec(dtype, tuple(view.get_shape()))


def write(
    folder: str | Path,
    config: dict,
    specs: Mapping[str, Spec],
    tensor: Callable[[str], Content],
    side_files: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder, asking for one tensor at a time by its name here.

    `side_files` is the folder that tokenizer, chat template and generation config are copied from.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, disk = _shards(specs, shard_bytes), families.disk_name(config)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: specs[name] for name in names}, tensor, disk)
        weight_map |= {disk(name): file for name in names}
    if len(shards) > 1:
        total = sum(spec.num_bytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    # Where a model was loaded from is no part of it: equal models must have equal bytes.
    family = families.of_moe(config)
    kept = family.written(config) if family else dict(config)
    kept.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(kept, indent=2, sort_keys=True))
    if side_files is not None:
        copy_side_files(side_files, folder)


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Tokenizer, chat template and generation config, those that are there."""
    for name in SIDE_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def _shards(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in specs:
        if shards[-1] and size + specs[name].num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += specs[name].num_bytes
    return shards


def save(path: Path, stored: Mapping[str, torch.Tensor]) -> None:
    """Write tensors by name as one safetensors file."""
    write_safetensors(path, specs_of(stored), stored.__getitem__)


def specs_of(stored: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: Spec(value.dtype, tuple(value.shape)) for name, value in stored.items()}


def write_safetensors(
    path: Path,
    specs: Mapping[str, Spec],
    tensor: Callable[[str], Content],
    disk: Callable[[str], str] = str,
) -> None:
    """One safetensors file (format: u64 header length, JSON header, bytes).

    `disk` gives the name of a tensor in the file. The widest types come first, so that every tensor
    is aligned for those who map the file.
    """
    specs = dict(sorted(specs.items(), key=lambda entry: -entry[1].dtype.itemsize))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.num_bytes
        header[disk(name)] = {
            "dtype": WRITTEN[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    begin = struct.pack("<Q", len(encoded)) + encoded
    with open(path, "wb", buffering=0) as file, _threads() as pool:
        out, at = file.fileno(), len(begin)
        average.reserve(out, at + offset)
        average.write(out, memoryview(begin), 0)
        pending = []
        for name, spec in specs.items():
            content = tensor(name)
            if isinstance(content, torch.Tensor):
                if tuple(content.shape) != spec.shape:
                    raise ValueError(f"{name} has shape {tuple(content.shape)}, not {spec.shape}")
                average.write(out, average.as_bytes(content.to(spec.dtype).contiguous()), at)
            else:
                for start in range(0, spec.num_bytes, PART_BYTES):
                    stop = min(start + PART_BYTES, spec.num_bytes)
                    pending.append(pool.submit(content, Part(out, at, start, stop)))
            at += spec.num_bytes
        for each in pending:
            each.result()


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads in each of which torch computes with one; what they have not begun is left undone."""
    before = torch.get_num_threads()
    count = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def same_specs(first: Checkpoint, second: Checkpoint, names: Iterable[str]) -> None:
    """Refuse two checkpoints whose tensors differ in shape."""
    for name in names:
        ours, theirs = first.spec(name).shape, second.spec(name).shape
        if ours != theirs:
            raise UserError(
                f"{name} is {list(ours)} in {first.folder} but {list(theirs)} in {second.folder}; "
                "both checkpoints must be of one family and size"
            )
