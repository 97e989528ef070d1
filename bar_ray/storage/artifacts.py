"""Artifacts: directories that are complete or absent.

`MANIFEST.json` (size and sha256 of every file) comes last: no manifest, no artifact. On a local
disk the finished directory is renamed into place; object stores cannot rename, so files go under
`data-<uuid>/` and the manifest naming that prefix is put last. Writers never mix.
Left out: copies of what is remote (`cache`), locks (`cluster.lease`), and which old artifacts to
delete (`retention`).
"""

import contextlib
import errno
import functools
import json
import os
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pyarrow import fs as pafs

from bar_ray.storage.files import (
    LOCAL_LEFTOVER,
    MANIFEST,
    REMOTE_LEFTOVER,
    beside,
    create,
    delete,
    digest,
    discard,
    each,
    hash_file,
    owner_is_gone,
    pour,
    read_bytes,
    sync,
    write_bytes,
)
from bar_ray.storage.uris import (
    Damaged,
    StorageError,
    explained,
    is_local,
    join,
    local_path,
    resolve,
    shown,
)


@dataclass(frozen=True)
class Manifest:
    """What an artifact consists of; `data` is the subdirectory of its files, if any."""

    files: dict[str, dict[str, Any]]
    info: dict[str, Any]
    data: str = ""
    created: str = ""

    @property
    def sha256(self) -> str:
        """Hash of names, sizes and contents: equal for bitwise equal artifacts, wherever made."""
        return digest(self.files)

    @property
    def sealed(self) -> bytes:
        """The bytes of `MANIFEST.json`; a checksum lets any wrong byte in them be found."""
        body = asdict(self)
        return json.dumps(body | {"checksum": digest(body)}, indent=1, sort_keys=True).encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _rebuild(uri: str) -> str:
    return f"delete {shown(uri)} and run the same command again to have it rebuilt"


def read_manifest(uri: str) -> Manifest | None:
    """What is committed at `uri`, None if nothing is."""
    place = join(uri, MANIFEST)
    try:
        raw = read_bytes(place)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    try:
        body = json.loads(raw)
        if body.pop("checksum") != digest(body):
            raise ValueError("its contents differ from its checksum")
        manifest = Manifest(**body)
        # A manifest from elsewhere must not name files outside of its artifact.
        if any(n.startswith("/") or ".." in n.split("/") for n in (manifest.data, *manifest.files)):
            raise ValueError("it names files outside of the artifact")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{shown(place)} is damaged: {error}\n{_rebuild(uri)}") from error
    return manifest


def committed(uri: str) -> Manifest:
    manifest = read_manifest(uri)
    if manifest is None:
        words = f"no artifact at {shown(uri)}: it has no {MANIFEST}"
        raise StorageError(f"{words}\nrun the step that makes it")
    return manifest


def check_file(uri: str, manifest: Manifest, read: Callable[[str, str], Any], name: str) -> None:
    """Read one file of an artifact and compare it with the manifest."""
    expected, place = manifest.files[name], join(uri, manifest.data, name)
    try:
        found = read(place, name)
    except FileNotFoundError as error:
        words = f"{shown(place)} is missing from a complete artifact"
        raise Damaged(f"{words}\n{_rebuild(uri)}") from error
    if found != expected:
        both = [f"{f['size']} bytes, sha256 {f['sha256']}" for f in (expected, found)]
        words = f"{shown(place)} is damaged: expected {both[0]}, found {both[1]}"
        raise Damaged(f"{words}\n{_rebuild(uri)}")


def verify(uri: str) -> Manifest:
    """Read every byte of an artifact and return its manifest if all are as committed."""
    manifest = committed(uri)
    check = functools.partial(check_file, uri, manifest, lambda place, _: hash_file(place))
    with explained("verify", uri):
        each(check, manifest.files)
    return manifest


def commit(local_dir: str, uri: str, info: dict[str, Any], keep: bool = False) -> Manifest:
    """Make the files of `local_dir` the artifact at `uri`, all at once, and return its manifest.

    `local_dir` is used up (moved where possible) unless `keep`; after a failure it is still there.
    When another commit was first, that one stands and its manifest is returned.
    """
    with explained("commit to", uri):
        source, info = os.path.realpath(local_dir), json.loads(json.dumps(info))
        if not os.path.isdir(source):
            raise StorageError(f"cannot commit {local_dir}: it is not a directory\ncheck the path")
        target = os.path.realpath(local_path(uri)) if is_local(uri) else ""
        if target and os.path.commonpath([source, target]) in (source, target):
            raise StorageError(
                f"cannot commit {source} to {uri}: one holds the other\nwork elsewhere"
            )
        manifest = read_manifest(uri)
        if manifest is None and is_local(uri):
            manifest = _commit_local(source, local_path(uri), info, keep)
        elif manifest is None:
            manifest = _commit_remote(source, uri, info)
        if not keep:
            discard(source)
        return manifest


def _walk(local_dir: str) -> tuple[list[str], bool]:
    """The files (relative, without the manifest), and whether links are among them."""
    files, linked = [], False
    for folder, subfolders, names in os.walk(local_dir, followlinks=True):
        files += [os.path.relpath(os.path.join(folder, name), local_dir) for name in names]
        linked |= any(os.path.islink(os.path.join(folder, name)) for name in subfolders + names)
    # A writer killed in here may have left an unfinished file: it is no part of the result.
    mine = {name for name in files if not re.fullmatch(LOCAL_LEFTOVER, os.path.basename(name))}
    return sorted(mine - {MANIFEST}), linked


def _commit_local(source: str, path: str, info: dict[str, Any], copy: bool) -> Manifest:
    parent, ours = os.path.dirname(path), beside(path)
    os.makedirs(parent, exist_ok=True)
    names, linked = _walk(source)
    # A link would point nowhere after a move, and a move between devices is a copy anyway.
    copy = copy or linked or os.stat(source).st_dev != os.stat(parent).st_dev
    staged = ours if copy else source

    def stage(name: str) -> dict[str, Any]:
        file, place = os.path.join(source, name), os.path.join(staged, name)
        found = pour(file, place) if copy else hash_file(file)
        sync(place)
        return found

    try:
        manifest = Manifest(each(stage, names), info, created=_now())
        write_bytes(os.path.join(staged, MANIFEST), manifest.sealed)
        for folder, _, _ in os.walk(staged):
            sync(folder)
        won = _rename_into_place(staged, path)
        sync(parent)
        return manifest if won else committed(path)
    except OSError as error:
        if copy or error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
        return _commit_local(source, path, info, copy=True)  # two mounts of a device, a mount point
    finally:
        discard(ours if copy else os.path.join(source, MANIFEST))


def _rename_into_place(staged: str, path: str) -> bool:
    """Rename a finished directory; False if another commit was there first."""
    while True:
        try:
            os.rename(staged, path)
            return True
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if os.path.exists(os.path.join(path, MANIFEST)):
            return False
        aside = beside(path)
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, aside)
        if os.path.exists(
            os.path.join(aside, MANIFEST)
        ):  # a commit came between look and move: put it back
            with contextlib.suppress(OSError):
                os.rename(aside, path)


def _commit_remote(source: str, uri: str, info: dict[str, Any]) -> Manifest:
    data = f"data-{uuid.uuid4().hex[:12]}"
    with contextlib.ExitStack() as undo:
        undo.callback(_forget, join(uri, data))
        upload = functools.partial(_upload, source, join(uri, data))
        files = each(upload, _walk(source)[0])
        if winner := read_manifest(uri):
            return winner
        undo.pop_all()  # a put reported as failed may still have been made
    write_bytes(join(uri, MANIFEST), Manifest(files, info, data, _now()).sealed)
    return committed(uri)


def _forget(uri: str) -> None:
    with contextlib.suppress(StorageError):
        delete(uri)


def _upload(source: str, uri: str, name: str) -> dict[str, Any]:
    with create(join(uri, name)) as sink:

        def send(chunk: bytes) -> None:
            sink.write(chunk)
            sink.flush()  # waits for the parts in flight, which would otherwise pile up in memory

        return hash_file(os.path.join(source, name), send)


def leftovers(uri: str, older_than_s: float = 86400) -> list[str]:
    """What killed writers left under `uri` and may be deleted. Readers never see it.

    Local leftovers when their process is gone from this host, remote ones when no manifest names
    them.
    """
    with explained("look through", uri):
        filesystem, path = resolve(uri)
        selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
        leftover = LOCAL_LEFTOVER if is_local(uri) else REMOTE_LEFTOVER
        newest: dict[str, float] = {}
        for info in filesystem.get_file_info(selector):
            if found := re.match(rf"(.*?/{leftover})(/|$)", info.path[len(path) :]):
                changed = (
                    info.mtime.timestamp() if info.mtime else 0.0
                )  # S3 "directories" have none
                newest[found[1]] = max(newest.get(found[1], 0.0), changed)
        old = [name for name, last in newest.items() if last < time.time() - older_than_s]
        return [join(uri, name) for name in old if _is_abandoned(uri, name)]


def _is_abandoned(uri: str, name: str) -> bool:
    artifact, _, last = name.rpartition("/")
    if not is_local(uri):
        manifest = read_manifest(join(uri, artifact))
        return manifest is None or manifest.data != last
    return owner_is_gone(last)
