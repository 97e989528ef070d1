"""Whole files behind URIs: read, write, list, delete, hash and fingerprint them."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from bar_ray.storage import hub
from bar_ray.storage.uris import StorageError, explained, is_local, join, local_path, resolve, shown

MANIFEST = "MANIFEST.json"
CHUNK = 8 << 20
THREADS = 8
TOKENIZER_FILES = (".json", ".jinja", ".txt", ".model")
CHECKPOINT_FILES = (".safetensors", *TOKENIZER_FILES)  # not its README
LOCAL_LEFTOVER = r"\.[^/]+\.tmp-[^/]+-\d+-[0-9a-f]{8}"  # as made by `beside`
REMOTE_LEFTOVER = r"data-[0-9a-f]{12}"
FLAT = ("s3", "gcs", "abfs")  # object stores: no directories to create


def beside(path: str) -> str:
    """A hidden sibling of `path` for unfinished work; host and pid say whose it was."""
    head, name = os.path.split(path)
    return os.path.join(
        head, f".{name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    )


def owner_is_gone(path: str) -> bool:
    """Whether the process that made a sibling (`beside`) ran on this host and has ended."""
    host, pid, _ = path.rpartition(".tmp-")[2].rsplit("-", 2)
    return host == socket.gethostname() and not is_running(int(pid))


def scratch(folder: str) -> str:
    """A new, hidden folder for unfinished work; its maker removes it (`discard`).

    What makers that were killed have left in `folder` goes now.
    """
    with explained("make a folder in", folder):
        os.makedirs(folder, exist_ok=True)
        discard_abandoned(folder)
        path = beside(os.path.join(folder, "work"))
        os.mkdir(path)
        return path


def discard_abandoned(folder: str) -> None:
    for name in os.listdir(folder):
        if re.fullmatch(LOCAL_LEFTOVER, name) and owner_is_gone(name):
            discard(os.path.join(folder, name))


def cache_folder() -> str:
    """Where this machine keeps copies of what lies elsewhere ($BAR_RAY_CACHE)."""
    return os.path.expanduser(os.environ.get("BAR_RAY_CACHE", "~/.cache/bar_ray"))


def staging_folder(root: str) -> str:
    """Where what goes to a storage root is made: on its own disk, so that committing is a rename,
    or in the cache."""
    return os.path.join(local_path(root), "tmp") if is_local(root) else cache_folder()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(path: str) -> None:
    """Remove a local file or directory if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.remove(path)


def exists(uri: str) -> bool:
    with explained("look at", uri):
        filesystem, path = resolve(uri)
        return filesystem.get_file_info(path).type != pafs.FileType.NotFound


def read_bytes(uri: str) -> bytes:
    with explained("read", uri):
        filesystem, path = resolve(uri)
        with filesystem.open_input_stream(path, compression=None) as source:
            return source.read()


def read_tail(uri: str, most: int) -> bytes:
    """The last bytes of a file, all of it when it is shorter."""
    with explained("read", uri):
        filesystem, path = resolve(uri)
        with filesystem.open_input_file(path) as source:
            source.seek(max(0, source.size() - most))
            return source.read()


def create(uri: str) -> pa.NativeFile:
    filesystem, path = resolve(uri)
    if filesystem.type_name not in FLAT:
        filesystem.create_dir(os.path.dirname(path), recursive=True)
    return filesystem.open_output_stream(path, compression=None)


def write_bytes(uri: str, data: bytes) -> None:
    """Replace a file as a whole: readers see the old bytes or the new ones."""
    with explained("write", uri):
        if not is_local(uri):
            with create(uri) as sink:
                sink.write(data)
            return
        path = local_path(uri)
        unfinished = beside(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(unfinished, "wb") as sink:
                sink.write(data)
            sync(unfinished)
            os.replace(unfinished, path)
        finally:
            discard(unfinished)
        sync(os.path.dirname(path))


def read_json(uri: str) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(
            f"{shown(uri)} is not valid JSON: {error}\ndelete it to have it written anew"
        ) from error


def write_json(uri: str, value: Any) -> None:
    write_bytes(
        uri, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    )


def _list(uri: str, recursive: bool) -> list[tuple[str, pafs.FileInfo]]:
    """(relative path, info) of the files under a directory, sorted, without hidden ones."""
    filesystem, path = resolve(uri)
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    found = [
        (info.path[len(path) :].strip("/"), info)
        for info in filesystem.get_file_info(selector)
        if info.is_file
    ]
    return sorted((name, info) for name, info in found if not re.search(r"(^|/)\.", name))


def list_files(uri: str, recursive: bool = False) -> list[str]:
    """URIs of the files in a directory, sorted; hidden ones and unfinished work are left out."""
    with explained("list", uri):
        return [join(uri, name) for name, _ in _list(uri, recursive)]


def delete(uri: str) -> None:
    """Remove a file or a directory if it is there; a local directory disappears at once."""
    with explained("delete", uri):
        filesystem, path = resolve(uri)
        if is_local(uri) and os.path.lexists(path):
            aside = beside(path)
            os.rename(path, aside)
            discard(aside)
        elif not is_local(uri):
            kind = filesystem.get_file_info(path).type
            if kind == pafs.FileType.Directory:
                if filesystem.get_file_info(f"{path}/{MANIFEST}").is_file:
                    filesystem.delete_file(
                        f"{path}/{MANIFEST}"
                    )  # first, so that no half artifact can be read
                filesystem.delete_dir(path)
            elif kind == pafs.FileType.File:
                filesystem.delete_file(path)


def tree(uri: str) -> list[tuple[str, int, float]]:
    """(path below `uri`, bytes, time of change) of every file, without hidden ones."""
    with explained("list", uri):
        return [
            (name, info.size, info.mtime.timestamp() if info.mtime else 0.0)
            for name, info in _list(uri, recursive=True)
        ]


def move(uri: str, target: str) -> None:
    """Move a directory to a free place of the same storage; readers see it at one of them."""
    with explained("move", uri):
        filesystem, path = resolve(uri)
        _, place = resolve(target)
        if is_local(uri):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.rename(path, place)
            return
        pafs.copy_files(
            path, place, source_filesystem=filesystem, destination_filesystem=filesystem
        )
    delete(uri)


def check_writable(uri: str) -> None:
    """Fail now, not after hours of training, when nothing can be written under `uri`."""
    probe = join(uri, f".probe-{uuid.uuid4().hex[:8]}")
    write_bytes(probe, b"bar_ray")
    delete(probe)


def _chunks(uri: str) -> Iterator[bytes]:
    filesystem, path = resolve(uri)
    with filesystem.open_input_stream(path, compression=None) as source:
        while chunk := source.read(CHUNK):
            yield chunk


def hash_file(uri: str, sink: Callable[[bytes], Any] = len) -> dict[str, Any]:
    """Size and sha256 of a file, read once in bounded memory and poured elsewhere on the way."""
    size, sha = 0, hashlib.sha256()
    for chunk in _chunks(uri):
        size += len(chunk)
        sha.update(chunk)
        sink(chunk)
    return {"size": size, "sha256": sha.hexdigest()}


def pour(uri: str, path: str) -> dict[str, Any]:
    """Copy any file to a local one and hash it on the way."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as sink:
        return hash_file(uri, sink.write)


def each(work: Callable[[str], Any], names: Iterable[str]) -> dict[str, Any]:
    """Do the work for all names, a few at a time; the first failure is raised."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(work, names), strict=True))


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint_files(uri: str, suffixes: tuple[str, ...] = ("",)) -> str:
    """Fingerprint of names and contents of a file, or of a directory's files with these suffixes.

    Contents are read once per size and modification time: this machine remembers their hashes.
    """
    with explained("read", uri):
        filesystem, path = resolve(uri)
        if uri.startswith(hub.SCHEME):
            return digest(sorted(hub.content(path).items()))
        info = filesystem.get_file_info(path)
        if info.is_file:
            found = {info.base_name: (uri, info)}
        else:
            listed = _list(uri, recursive=True)
            found = {n: (join(uri, n), i) for n, i in listed if n.endswith(suffixes)}
        if not found:
            raise StorageError(
                f"no data at {shown(uri)}\ncheck that path, as seen from this machine"
            )
        hashes = each(lambda name: _remembered_sha256(*found[name]), found)
        return digest(sorted(hashes.items()))


def _remembered_sha256(uri: str, info: pafs.FileInfo) -> str:
    known = (uri, info.size, info.mtime_ns)
    with _memory() as memory:
        row = memory.execute(
            "SELECT sha256 FROM hashes WHERE uri = ? AND size = ? AND mtime_ns = ?", known
        ).fetchone()
    if row is None:
        row = (hash_file(uri)["sha256"],)
        with _memory() as memory:
            memory.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)", (*known, *row))
    return row[0]


@contextlib.contextmanager
def _memory() -> Iterator[sqlite3.Connection]:
    """The hashes this machine has computed; committed on leaving."""
    os.makedirs(cache_folder(), exist_ok=True)
    place = f"{cache_folder()}/hashes.sqlite"
    with contextlib.closing(sqlite3.connect(place, timeout=60)) as memory, memory:
        memory.execute(
            "CREATE TABLE IF NOT EXISTS hashes "
            "(uri TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 TEXT)"
        )
        yield memory
