"""Datasets of the Hugging Face Hub behind `hf://datasets/OWNER/NAME[@REVISION][/PATH]`.

Read as any other storage, a range at a time, with the token of `hf auth login` or $HF_TOKEN. The
Hub knows the hash of every file, so nothing is downloaded to see whether one has changed.
"""

import functools
from collections.abc import Callable
from typing import Any

from pyarrow import fs as pafs

SCHEME = "hf://"


def filesystem() -> pafs.FileSystem:
    return pafs.PyFileSystem(_Handler(_hub()))


def content(path: str) -> dict[str, str]:
    """Hash of every file, by its path below `path`."""
    found = _plainly(_hub().find)(path, detail=True)
    hashes = {name: _hash(info) for name, info in found.items()}
    return {name[len(path) :].strip("/"): value for name, value in hashes.items()}


def _hash(info: dict[str, Any]) -> str:
    large = info.get("lfs")
    return str(large["sha256"] if large else info["blob_id"])


@functools.cache
def _hub() -> Any:
    from huggingface_hub import HfFileSystem  # seconds, and few recipes need it

    return HfFileSystem()


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of the Hub's client are of many kinds; those of file systems are OSErrors."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        from huggingface_hub.errors import HTTPError

        try:
            return function(*args, **options)
        except HTTPError as error:
            raise OSError(f"Hugging Face Hub: {error}") from error

    return call


class _Handler(pafs.FSSpecHandler):
    """What readers of datasets need, with plain errors."""


for _name in ("get_file_info", "get_file_info_selector", "open_input_file", "open_input_stream"):
    setattr(_Handler, _name, _plainly(getattr(pafs.FSSpecHandler, _name)))
