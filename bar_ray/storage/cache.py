"""Copies of remote artifacts on this machine ($BAR_RAY_CACHE): downloaded once, verified, shared.

A process that was given a copy holds a lock on it until it ends. Before another copy is made, those
that nobody holds give way to it, the longest unused first, so that all together stay within
$BAR_RAY_CACHE_GB (half of the disk's free space, when that is not set).
"""

import contextlib
import fcntl
import functools
import os
import shutil
from collections.abc import Iterator
from typing import IO

from bar_ray.storage.artifacts import (
    Manifest,
    check_file,
    commit,
    committed,
    read_manifest,
    verify,
)
from bar_ray.storage.files import (
    beside,
    cache_folder,
    delete,
    discard,
    discard_abandoned,
    each,
    pour,
)
from bar_ray.storage.uris import Damaged, StorageError, explained, is_local, join, local_path, shown

_held: dict[str, IO[str]] = {}  # copy -> the open file with this process's lock


def fetch(uri: str, cache_dir: str | None = None) -> str:
    """A local directory with the verified files of an artifact: itself, or a copy in the cache."""
    if is_local(uri):
        return os.path.join(local_path(uri), verify(uri).data).rstrip("/")
    manifest = committed(uri)
    target = join(cache_dir or cache_folder(), manifest.sha256)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(f"{target}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the processes of a machine download a file once
        _hold(target)
        return _download(uri, manifest, target)


def _hold(target: str) -> None:
    """Keep a copy from being removed for as long as this process lives."""
    if target not in _held:
        _held[target] = handle = open(f"{target}.held", "a")  # noqa: SIM115
        fcntl.flock(handle, fcntl.LOCK_SH)
    os.utime(f"{target}.held")  # last used


def _download(uri: str, manifest: Manifest, target: str) -> str:
    try:
        if read_manifest(target):
            verify(target)
            return target
    except Damaged:
        delete(target)  # a damaged copy is fetched anew
    _make_room(os.path.dirname(target), sum(file["size"] for file in manifest.files.values()))
    ours = beside(target)
    download = functools.partial(
        check_file, uri, manifest, lambda place, name: pour(place, os.path.join(ours, name))
    )
    try:
        with explained(f"fetch {shown(uri)} to", target):
            os.makedirs(ours)
            each(download, manifest.files)
        commit(ours, target, manifest.info)
    finally:
        discard(ours)
    return target


def _make_room(folder: str, needed: int) -> None:
    """Remove copies that nobody holds until `needed` bytes more are within the limit."""
    discard_abandoned(folder)
    copies = [e.path for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")]
    sizes = {path: _size(path) for path in copies}
    total = sum(sizes.values())
    most = _limit(folder, total)
    for path in sorted(sizes, key=_last_used):
        if total + needed <= most:
            return
        with _unheld(path) as is_free:
            if is_free:
                delete(path)
                total -= sizes[path]


def _limit(folder: str, total: int) -> float:
    setting = os.environ.get("BAR_RAY_CACHE_GB", "")
    try:
        return float(setting) * 1e9 if setting else (shutil.disk_usage(folder).free + total) / 2
    except ValueError:
        words = f"BAR_RAY_CACHE_GB is {setting!r}, which is not a number"
        raise StorageError(f"{words}\nset it to how many GB copies may take") from None


def _size(path: str) -> int:
    """Bytes of a copy, by its manifest: its files may be on their way out."""
    with contextlib.suppress(Damaged):
        if manifest := read_manifest(path):
            return sum(file["size"] for file in manifest.files.values())
    return 0


def _last_used(path: str) -> float:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(f"{path}.held").st_mtime
    return os.stat(path).st_mtime


@contextlib.contextmanager
def _unheld(path: str) -> Iterator[bool]:
    """Whether no process holds a copy; while in here, none can."""
    with open(f"{path}.held", "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
