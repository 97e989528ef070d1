"""The `import` verb: a dense Hugging Face checkpoint from anywhere becomes an artifact.

Only what a checkpoint needs is taken (safetensors, config, tokenizer), so nothing executable
enters, and from here on every byte is known by its hash.
"""

import json
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
            checkpoint = Checkpoint(folder)  # refuses what is not whole
        except UserError as error:
            raise UserError(str(error).replace(folder, uri)) from error
        if checkpoint.config.get("tie_word_embeddings"):
            untie(checkpoint)


def untie(checkpoint: Checkpoint) -> None:
    """Give a model an LM head of its own, equal to its embeddings, in a file of its own.

    Both can then learn or stay frozen by themselves, and be averaged by themselves.
    """
    folder, single = checkpoint.folder, checkpoint.folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.exists():  # readers that find it look for no other file
        single.rename(folder / "model-0.safetensors")
    places = dict.fromkeys(checkpoint.names, "model-0.safetensors")
    if index.exists():
        places = json.loads(index.read_text())["weight_map"]
    head = "model-lm_head.safetensors"
    tensors.save(folder / head, {"lm_head.weight": checkpoint["model.embed_tokens.weight"]})
    weight_map = {**places, "lm_head.weight": head}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
    config = {**checkpoint.config, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


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
