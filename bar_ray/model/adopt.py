"""The `import` verb: a dense Hugging Face checkpoint from anywhere becomes an artifact.

Only what a checkpoint needs is taken (safetensors, config, tokenizer), so nothing executable
enters, and from here on every byte is known by its hash.
"""

import shutil
from pathlib import Path
from typing import Any

from bar_ray import storage
from bar_ray.model import tensors
from bar_ray.model.tensors import Checkpoint
from bar_ray.types import UserError

KEPT = ("config.json", "model.safetensors.index.json", *tensors.SIDE_FILES)


def run(step: Any, run: Any) -> None:
    """Data: `checkpoint`, a folder of safetensors, config and tokenizer."""
    uri = run.locate(step, "checkpoint", storage.CHECKPOINT_FILES)
    if storage.read_manifest(uri):  # one of ours: remote files lie one folder deeper
        uri = storage.join(uri, storage.verify(uri).data)
    with run.output(step) as folder:
        for file in storage.list_files(uri):
            name = file.split("?")[0].rsplit("/", 1)[-1]
            if name in KEPT or name.endswith(".safetensors"):
                copy(file, Path(folder, name))
        try:
            Checkpoint(folder)  # refuses what is not whole
        except UserError as error:
            raise UserError(str(error).replace(folder, uri)) from error


def tokenizer(step: Any, run: Any) -> None:
    """Data: `checkpoint`; the files of its tokenizer alone."""
    uri = run.locate(step, "checkpoint", storage.TOKENIZER_FILES)
    with run.output(step) as folder:
        for file in storage.list_files(uri):
            name = file.split("?")[0].rsplit("/", 1)[-1]
            if name.endswith(storage.TOKENIZER_FILES):
                copy(file, Path(folder, name))


def copy(uri: str, target: Path) -> None:
    """Stream one file from any storage to a local path."""
    filesystem, path = storage.resolve(uri)
    with filesystem.open_input_stream(path) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 16 * 2**20)
