"""Strings that say where: a local path, `file://`, `s3://` (another endpoint through
AWS_ENDPOINT_URL or `?endpoint_override=host:port&scheme=http`), `gs://`, `hf://` (a dataset of the
Hugging Face Hub, to read) or whatever else `pyarrow.fs` knows.

Strings cross process borders, file system objects should not. Every failure behind a URI becomes
one clear message here.
"""

import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from bar_ray.storage import hub
from bar_ray.types import UserError

S3_ATTEMPTS = 7  # with growing, random pauses between them: about half a minute

# The first pattern found in the system's or the store's words decides what the reader should do.
HINTS = {
    "Hugging Face": (
        "check the name, the network and $HF_TOKEN, or fetch it where there is a network with "
        "`hf download --repo-type dataset OWNER/NAME --local-dir FOLDER` and give that folder"
    ),
    "NO_SUCH_BUCKET|[Bb]ucket .*not (found|exist)": "create the bucket or correct the URI",
    "ENOSPC|EDQUOT|QuotaExceeded": "the storage is full: free some space and run it again",
    "EACCES|EPERM|EROFS|ACCESS_DENIED|INVALID_ACCESS|SIGNATURE": (
        "check permissions and credentials, or choose another location"
    ),
    "NETWORK|curlCode|[Tt]imeout|refused": "check the endpoint, the network and the credentials",
    "ENOTDIR|EEXIST|EISDIR": "a file is where a directory should be: choose another path",
    "ENOENT|NO_SUCH|NOT_FOUND|not exist": "check the path",
    "ArrowInvalid": "write a URI as /path, file:///path, s3://bucket/path or gs://bucket/path",
}


class StorageError(UserError):
    """A storage operation that failed: what, where, and what to do."""


class Damaged(StorageError):
    """What was read is not what was committed: trying again will not mend it."""


def shown(uri: str) -> str:
    """A URI for messages: without its query, and without keys."""
    return re.sub("//[^/@]*@", "//", uri.partition("?")[0]) if "://" in uri else uri


@contextlib.contextmanager
def explained(action: str, uri: str) -> Iterator[None]:
    """Turn what the system or the store says into one clear message."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        number, text = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
        words = f"{type(error).__name__} {errno.errorcode.get(number or 0, '')} {error}"
        hints = [hint for pattern, hint in HINTS.items() if re.search(pattern, words)]
        reason = (text or str(error)).split("\n")[0][:300]
        hint = (hints or ["check the location and run the same command again"])[0]
        raise StorageError(f"cannot {action} {shown(uri)}: {reason}\n{hint}") from error


@contextlib.contextmanager
def unless_full(action: str, path: str) -> Iterator[None]:
    """One clear message when the disk fills up; other errors are left as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with explained(action, path):
            raise


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str:
    """The absolute path behind a local URI."""
    if uri.startswith("file://"):
        return os.path.abspath(unquote(urlsplit(uri).path))
    if not uri or "://" in uri or re.match(r"[A-Za-z][\w+.-]+:", uri):
        raise StorageError(
            f"{uri!r} is not a local path\nwrite it as /path, or with two slashes: s3://bucket/path"
        )
    return os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *parts: str) -> str:
    """Append path parts, keep the query, make local paths absolute (workers have another cwd)."""
    names = [part.strip("/") for part in parts if part.strip("/")]
    if "://" not in uri:
        return os.path.join(local_path(uri), *names)
    head, mark, query = uri.partition("?")
    path = "/".join([head.rstrip("/"), *(quote(name, safe="/~+=@,") for name in names)])
    return path + mark + query


@functools.lru_cache(maxsize=64)
def _connect(root: str) -> tuple[pafs.FileSystem, str]:
    filesystem, base = pafs.FileSystem.from_uri(root)
    if isinstance(filesystem, pafs.S3FileSystem):
        # A URI cannot say how patient to be. Refusals (403, 404) are not tried again; GCS waits for
        # 15 minutes by itself.
        make, (options,) = filesystem.__reduce__()
        patient = pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS)
        filesystem = make({**options, "retry_strategy": patient})
    return filesystem, base


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system behind a URI and the path on it."""
    if is_local(uri):
        return pafs.LocalFileSystem(), local_path(uri)
    with explained("open", uri):
        if uri.startswith(hub.SCHEME):
            return hub.filesystem(), unquote(uri.removeprefix(hub.SCHEME)).rstrip("/")
        head, _, query = uri.partition("?")
        scheme, _, rest = head.partition("://")
        place, _, path = rest.partition("/")
        if not place and scheme in ("s3", "gs", "gcs"):
            raise StorageError(f"{shown(uri)} names no bucket\nwrite it as {scheme}://bucket/path")
        options = dict(parse_qsl(query))
        endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
        if scheme == "s3" and endpoint.netloc and "endpoint_override" not in options:
            options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
        filesystem, base = _connect(
            f"{scheme}://{place}/" + (f"?{urlencode(options)}" if options else "")
        )
        return filesystem, "/".join(
            part for part in (base.rstrip("/"), unquote(path).strip("/")) if part
        )
