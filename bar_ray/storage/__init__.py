"""The one door to storage: URIs, whole files and artifacts."""

from bar_ray.storage.artifacts import Manifest, commit, fetch, leftovers, read_manifest, verify
from bar_ray.storage.files import (
    CHECKPOINT_FILES,
    MANIFEST,
    check_writable,
    delete,
    exists,
    fingerprint_files,
    list_files,
    move,
    read_bytes,
    read_json,
    tree,
    write_bytes,
    write_json,
)
from bar_ray.storage.uris import Damaged, StorageError, is_local, join, local_path, resolve

__all__ = [
    "CHECKPOINT_FILES",
    "MANIFEST",
    "Damaged",
    "Manifest",
    "StorageError",
    "check_writable",
    "commit",
    "delete",
    "exists",
    "fetch",
    "fingerprint_files",
    "is_local",
    "join",
    "leftovers",
    "list_files",
    "local_path",
    "move",
    "read_bytes",
    "read_json",
    "read_manifest",
    "resolve",
    "tree",
    "verify",
    "write_bytes",
    "write_json",
]
