"""Whole files behind URIs: read, write, list, delete, hash and fingerprint them."""

import fnmatch
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from bar_ray.storage.uris import StorageError, explained, is_local, join, local_path, resolve, shown

MANIFEST = "MANIFEST.json"
CHUNK = 8 << 20
THREADS = 8
LOCAL_LEFTOVER = r"\.[^/]+\.tmp-[^/]+-\d+-[0-9a-f]{8}"
REMOTE_LEFTOVER = r"data-[0-9a-f]{12}"
FLAT = ("s3", "gcs", "abfs")  # object stores: no directories to create


def beside(path: str) -> str:
    """A hidden sibling of `path` for unfinished work; host and pid say whose it was."""
    head, name = os.path.split(path)
    return os.path.join(
        head, f".{name}.tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    )


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


@functools.lru_cache(maxsize=1 << 16)
def _remembered_sha256(uri: str, size: int, mtime_ns: int) -> str:
    return hash_file(uri)["sha256"]


def _matches(name: str, pattern: str) -> bool:
    if "**" in pattern:
        return fnmatch.fnmatchcase(name, pattern.replace("**/", "*"))
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def fingerprint_files(uri: str) -> str:
    """Fingerprint of names and contents behind a file, directory or glob, wherever stored.

    Contents are hashed once per process, size and modification time. Globs know `*`, `[ab]`, `**`.
    """
    with explained("read", uri):
        filesystem, path = resolve(uri)
        info = filesystem.get_file_info(path)
        head, mark, query = (path, "", "") if is_local(uri) else uri.partition("?")
        wild = re.search(r"[^/]*[*\[].*", head)
        if info.is_file:
            found = [(info.base_name, info, uri)]
        elif wild and info.type == pafs.FileType.NotFound:
            base, pattern = head[: wild.start()] + mark + query, unquote(wild[0])
            listed = _list(base, recursive="/" in pattern or "**" in pattern)
            found = [(n, i, join(base, n)) for n, i in listed if _matches(n, pattern)]
        else:
            found = [(n, i, join(uri, n)) for n, i in _list(uri, recursive=True)]
        if not found:
            raise StorageError(
                f"no data at {shown(uri)}\ncheck that path, as seen from this machine"
            )
        return digest([(n, _remembered_sha256(u, i.size, i.mtime_ns)) for n, i, u in found])
