"""An S3 protocol server (moto) that can be told to fail, to be slow, or to be full."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pyarrow.fs

ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message>'
    "<RequestId>1</RequestId></Error>"
)
Answer = tuple[str, str, str]  # status, code, message


class Faulty:
    """Stands before moto's application: `fault(method, path)` gives the answer in its place."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.fault: Callable[[str, str], Answer | None] = lambda *_: None
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

    def work(self) -> None:
        """Answer as it should."""
        self.fault = lambda *_: None

    def fail(self, times: int, status: str, code: str, method: str = "") -> None:
        """The next requests (of one method) get an error."""
        left, lock = [times], threading.Lock()

        def fault(asked: str, path: str) -> Answer | None:
            with lock:
                if method not in ("", asked) or not left[0]:
                    return None
                left[0] -= 1
                return status, code, "injected"

        self.fault, self.refused = fault, 0

    def slow(self, seconds: float) -> None:
        """Every request takes that much longer."""
        self.fault = lambda *_: time.sleep(seconds)


@contextlib.contextmanager
def serving() -> Iterator[tuple[Faulty, str]]:
    """The server with an empty bucket, and `?...`, the query of its URIs: `s3://bkt/...?...`.

    Meanwhile this process and those it starts have keys for it and no proxy.
    """
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    faulty = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    endpoint = f"127.0.0.1:{server.server_port}"
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    with mock.patch.dict(os.environ, {**keys, "AWS_DEFAULT_REGION": "us-east-1"}):
        for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
            del os.environ[name]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            pyarrow.fs.S3FileSystem(
                endpoint_override=endpoint, scheme="http", allow_bucket_creation=True
            ).create_dir("bkt")
            yield faulty, f"?endpoint_override={endpoint}&scheme=http"
        finally:
            server.shutdown()
