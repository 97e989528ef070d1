"""Object storage that fails for a while, for good, or answers slowly: a real S3 protocol server."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bar_ray import storage
from bar_ray.bench.outages import Faulty, serving


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Faulty, str]]:
    with serving() as (faulty, query):
        yield faulty, f"s3://bkt/run{query}"


@pytest.fixture
def faulty(server: tuple[Faulty, str]) -> Iterator[Faulty]:
    yield server[0]
    server[0].work()


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
    faulty.work()
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
