"""Object storage that fails for a while, for good, or answers slowly: a real S3 protocol server."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from bar_ray import storage

ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message>'
    "<RequestId>1</RequestId></Error>"
)


class Faulty:
    """Stands before moto's application: `fault(method, path)` gives the answer in its place."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.fault: Callable[[str, str], tuple[str, str, str] | None] = lambda *_: None
        self.refused = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        found = self.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if found is None:
            return self.application(environ, start_response)
        self.refused += 1
        status, code, message = found
        body = ERROR.format(code, message).encode()
        environ["wsgi.input"].read()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response(status, headers)
        return [body]

    def fail(self, times: int, status: str, code: str, method: str = "") -> None:
        """The next requests (of one method) get an error."""
        left, lock = [times], threading.Lock()

        def fault(asked: str, path: str) -> tuple[str, str, str] | None:
            with lock:
                if method not in ("", asked) or not left[0]:
                    return None
                left[0] -= 1
                return status, code, "injected"

        self.fault, self.refused = fault, 0


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Faulty, str]]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    faulty = Faulty(DomainDispatcherApplication(create_backend_app))
    made = make_server("127.0.0.1", 0, faulty, threaded=True)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "x")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        thread.start()
        endpoint = f"127.0.0.1:{made.server_port}"
        pyarrow.fs.S3FileSystem(
            endpoint_override=endpoint, scheme="http", allow_bucket_creation=True
        ).create_dir("bkt")
        yield faulty, f"s3://bkt/run?endpoint_override={endpoint}&scheme=http"
        made.shutdown()


@pytest.fixture
def faulty(server: tuple[Faulty, str]) -> Iterator[Faulty]:
    yield server[0]
    server[0].fault = lambda *_: None


def folder(path: Path, size: int = 1000) -> str:
    path.mkdir()
    for name in "abc":
        (path / name).write_bytes(name.encode() * size)
    return str(path)


def test_errors_that_pass_are_waited_for(
    server: tuple[Faulty, str], faulty: Faulty, tmp_path: Path
) -> None:
    uri = storage.join(server[1], "storm")
    faulty.fail(2, "503 Slow Down", "SlowDown")
    storage.commit(folder(tmp_path / "work"), uri, {"made": "in a storm"})
    assert faulty.refused == 2
    faulty.fail(1, "500 Internal Server Error", "InternalError", "GET")
    assert storage.verify(uri).info == {"made": "in a storm"}
    assert faulty.refused == 1


def test_a_refusal_is_told_at_once_and_loses_nothing(
    server: tuple[Faulty, str], faulty: Faulty, tmp_path: Path
) -> None:
    uri, work = storage.join(server[1], "denied"), folder(tmp_path / "work")
    faulty.fail(10**6, "403 Forbidden", "AccessDenied", "PUT")
    started = time.monotonic()
    with pytest.raises(storage.StorageError, match="check permissions and credentials"):
        storage.commit(work, uri, {})
    assert time.monotonic() - started < 5
    faulty.fault = lambda *_: None
    assert storage.read_manifest(uri) is None
    assert sorted(p.name for p in Path(work).iterdir()) == ["a", "b", "c"]
    storage.commit(work, uri, {})
    storage.verify(uri)


def test_an_outage_that_lasts_is_told_in_the_end(
    server: tuple[Faulty, str], faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bar_ray.storage import uris

    monkeypatch.setattr(uris, "S3_ATTEMPTS", 3)
    uris._connect.cache_clear()
    faulty.fail(10**6, "503 Slow Down", "SlowDown")
    try:
        with pytest.raises(storage.StorageError, match="cannot read"):
            storage.read_bytes(storage.join(server[1], "denied", storage.MANIFEST))
    finally:
        uris._connect.cache_clear()
    assert faulty.refused == 3
