"""Storage on a local disk and on a real S3-protocol server: the same tests for both."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from bar_ray import storage
from bar_ray.cluster.run import Run
from bar_ray.graph import Step
from bar_ray.recipe import Recipe
from bar_ray.storage import StorageError, files, uris
from bar_ray.types import UserError


def work_dir(path: Path, **files: str) -> str:
    for name, text in (files or {"model": "weights" * 1000, "sub__config": "{}"}).items():
        place = path / name.replace("__", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return str(path)


def damage(uri: str, name: str, change: bytes | None = None) -> None:
    """Flip one byte of a file of an artifact (or replace the file)."""
    place = storage.join(uri, storage.read_manifest(uri).data, name)
    data = bytearray(storage.read_bytes(place))
    data[len(data) // 2] ^= 1
    storage.write_bytes(place, bytes(data) if change is None else change)


def run_python(code: str, *args: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_files(root: str) -> None:
    place = storage.join(root, "runs/r 1", "run.json")
    assert not storage.exists(place) and storage.list_files(root) == []
    storage.write_json(place, {"b": 1, "a": "é"})
    storage.write_json(place, {"b": 2, "a": "é"})
    assert storage.read_json(place) == {"a": "é", "b": 2}
    assert storage.read_bytes(place).index(b'"a"') < storage.read_bytes(place).index(b'"b"')
    storage.write_bytes(storage.join(root, "top"), b"")
    assert storage.list_files(root) == [storage.join(root, "top")]
    assert storage.list_files(root, recursive=True) == [place, storage.join(root, "top")]
    storage.delete(storage.join(root, "runs"))
    storage.delete(storage.join(root, "nothing"))
    assert storage.list_files(root, recursive=True) == [storage.join(root, "top")]
    storage.check_writable(root)
    assert storage.list_files(root, recursive=True) == [storage.join(root, "top")]


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.join("a/b", "c", "/d/") == str(tmp_path / "a/b/c/d")
    assert storage.join("s3://b/x?scheme=http", "y", "z w") == "s3://b/x/y/z%20w?scheme=http"
    assert storage.local_path("file:///a/b%20c") == "/a/b c"
    assert (
        storage.is_local("a") and storage.is_local("file:///a") and not storage.is_local("s3://a")
    )
    for wrong in ("s3:/bkt/x", "s3://", "abc://x", "s3://bkt/x?bogus=1", ""):
        with pytest.raises(StorageError) as failure:
            storage.read_bytes(wrong)
        assert str(failure.value).count("\n") == 1


def test_endpoint_from_the_environment(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"s3://bkt/env{s3}", b"hello")
    endpoint = re.search("endpoint_override=([^&]+)", s3)[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    assert storage.read_bytes("s3://bkt/env") == b"hello"


def test_commit_verify_fetch(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "artifacts", "sft", "math", "f1")
    assert storage.read_manifest(uri) is None
    with pytest.raises(StorageError, match="no artifact at"):
        storage.fetch(uri)
    made = storage.commit(work_dir(tmp_path / "w"), uri, {"step": 3})
    assert not (tmp_path / "w").exists()
    assert storage.read_manifest(uri) == storage.verify(uri) == made
    assert made.info == {"step": 3} and list(made.files) == ["model", "sub/config"]
    local = Path(storage.fetch(uri, str(tmp_path / "cache")))
    assert (local / "model").read_text() == "weights" * 1000
    assert (local / "sub/config").read_text() == "{}"
    elsewhere = storage.commit(work_dir(tmp_path / "w"), str(tmp_path / "other"), {}, keep=True)
    assert elsewhere.sha256 == made.sha256 and (tmp_path / "w/model").exists()
    storage.delete(uri)
    assert storage.read_manifest(uri) is None


def test_the_first_commit_stands(root: str, tmp_path: Path) -> None:
    first = storage.commit(work_dir(tmp_path / "w", a="1"), root, {})
    assert storage.commit(work_dir(tmp_path / "w", a="2", b="2"), root, {}) == first
    assert storage.verify(root) == first and not (tmp_path / "w").exists()


def test_a_directory_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    uri = work_dir(tmp_path / "store/f1", old="half")
    assert storage.read_manifest(uri) is None
    storage.commit(work_dir(tmp_path / "w", new="whole"), uri, {})
    assert sorted(os.listdir(uri)) == ["MANIFEST.json", "new"]
    assert storage.list_files(str(tmp_path / "store"), recursive=True) == [
        f"{uri}/MANIFEST.json",
        f"{uri}/new",
    ]


def test_a_wrong_byte_is_named(root: str, tmp_path: Path) -> None:
    storage.commit(work_dir(tmp_path / "w"), root, {})
    damage(root, "model")
    for use in (storage.verify, storage.fetch):
        with pytest.raises(
            StorageError, match=r"model.* is damaged: expected 7000.* found(.|\n)*delete"
        ):
            use(root)
    damage(root, "model", change=b"weights")
    with pytest.raises(StorageError, match="found 7 bytes"):
        storage.verify(root)
    storage.delete(storage.join(root, storage.read_manifest(root).data, "sub/config"))
    damage(root, "model", change=b"weights" * 1000)
    with pytest.raises(StorageError, match="sub/config is missing"):
        storage.verify(root)


def test_any_wrong_byte_in_the_manifest_is_found(root: str, tmp_path: Path) -> None:
    storage.commit(work_dir(tmp_path / "w"), root, {"step": 100})
    place = storage.join(root, storage.MANIFEST)
    good = storage.read_bytes(place)
    wrong = [good[: len(good) // 2], b"", b"[]", b"null", b"\xff\xfe", good.replace(b"100", b"900")]
    for bad in wrong:
        storage.write_bytes(place, bad)
        with pytest.raises(StorageError, match=r"MANIFEST\.json.* is damaged: .*\n.*delete"):
            storage.read_manifest(root)


def test_a_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    foreign = storage.Manifest({"../../etc/passwd": {"size": 1, "sha256": ""}}, {})
    storage.write_bytes(str(tmp_path / storage.MANIFEST), foreign.sealed)
    with pytest.raises(StorageError, match="outside"):
        storage.fetch(str(tmp_path))


def test_what_a_killed_writer_left_in_the_work_dir_is_not_committed(
    root: str, tmp_path: Path
) -> None:
    work = Path(work_dir(tmp_path / "w", a="1"))
    Path(files.beside(str(work / storage.MANIFEST))).write_text("unfinished")
    (work / storage.MANIFEST).write_text("old")
    (work / ".hidden").write_text("but wanted")
    assert list(storage.commit(str(work), root, {}).files) == [".hidden", "a"]
    assert storage.verify(root)


KILLED = """
import itertools, os, sys
from bar_ray import storage; from bar_ray.storage import files
root, work = sys.argv[1:]
for i in itertools.count():
    uri = storage.join(root, f"artifact{i % 3}")
    storage.delete(uri)
    os.makedirs(work, exist_ok=True)
    for name in "abc":
        with open(os.path.join(work, name), "wb") as f:
            f.write(os.urandom(200_000))
    storage.commit(work, uri, {"i": i})
    print("x" if i == 0 else "", flush=True)
"""


def test_a_kill_at_any_moment_leaves_no_half_artifact(root: str, tmp_path: Path) -> None:
    dice, seen = random.Random(0), 0
    for _ in range(6):
        child = run_python(KILLED, root, str(tmp_path / "w"))
        assert child.stdout.readline() == "x\n"
        time.sleep(dice.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        for i in range(3):
            uri = storage.join(root, f"artifact{i}")
            if storage.read_manifest(uri):
                seen += 1
                assert len(storage.verify(uri).files) == 3
    assert seen >= 6
    storage.commit(work_dir(tmp_path / "w2"), storage.join(root, "artifact3"), {})
    for uri in storage.leftovers(root, older_than_s=-5):
        storage.delete(uri)
    assert storage.leftovers(root, older_than_s=-5) == []
    if storage.is_local(root):
        assert [name for name in os.listdir(root) if name.startswith(".")] == []
    for i in range(4):
        uri = storage.join(root, f"artifact{i}")
        assert storage.read_manifest(uri) is None or storage.verify(uri)


RACER = """
import os, sys, time
from bar_ray import storage; from bar_ray.storage import files
root, work, tag, start = sys.argv[1:]
for i in range(8):
    os.makedirs(work)
    for name in "ab":
        with open(os.path.join(work, name), "w") as f:
            f.write(tag * 1000)
    time.sleep(max(0, float(start) + i * 0.15 - time.time()))
    print(storage.commit(work, storage.join(root, str(i)), {"tag": tag}).sha256)
"""


def test_two_commits_at_once(root: str, tmp_path: Path) -> None:
    if storage.is_local(root):
        work_dir(Path(root, "3"), stale="no manifest here")
    start = str(time.time() + 2)
    racers = [run_python(RACER, root, str(tmp_path / tag), tag, start) for tag in "xy"]
    returned = [racer.communicate(timeout=30)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    for i in range(8):
        uri = storage.join(root, str(i))
        manifest = storage.verify(uri)
        there = {storage.read_bytes(storage.join(uri, manifest.data, name)) for name in "ab"}
        assert there == {manifest.info["tag"].encode() * 1000}
        if storage.is_local(root):
            assert returned[0][i] == returned[1][i] == manifest.sha256


def copies(cache: str) -> set[str]:
    return {place.name for place in Path(cache).iterdir() if place.is_dir()}


def test_two_fetches_at_once(s3: str, tmp_path: Path) -> None:
    uri, cache = f"s3://bkt/{tmp_path.name}{s3}", str(tmp_path / "cache")
    storage.commit(work_dir(tmp_path / "w", a="a" * 3_000_000, b="b"), uri, {})
    code = "import sys; from bar_ray import storage; print(storage.fetch(*sys.argv[1:]))"
    children = [run_python(code, uri, cache) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        here = list(pool.map(lambda _: storage.fetch(uri, cache), range(2)))
    found = {child.communicate(timeout=30)[0].strip() for child in children} | set(here)
    assert len(found) == 1 and copies(cache) == {Path(here[0]).name}
    inode = os.stat(here[0]).st_ino
    assert storage.fetch(uri, cache) == here[0] and os.stat(here[0]).st_ino == inode
    damage(here[0], "a")  # a damaged copy in the cache is fetched anew
    assert Path(storage.fetch(uri, cache), "a").read_text() == "a" * 3_000_000


def test_the_cache_makes_room_where_nobody_looks(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = f"s3://bkt/{tmp_path.name}{s3}", str(tmp_path / "cache")
    names = {}
    for name in "abc":
        folder = work_dir(tmp_path / name, model=(name + tmp_path.name) * 50_000)
        names[name] = storage.commit(folder, storage.join(root, name), {}).sha256
    size = storage.read_manifest(storage.join(root, "a")).files["model"]["size"]
    monkeypatch.setenv("BAR_RAY_CACHE_GB", str(2.5 * size / 1e9))
    code = "import sys; from bar_ray import storage; storage.fetch(*sys.argv[1:]); print('there')"

    def fetch(name: str, then: str = "") -> subprocess.Popen:
        child = run_python(f"{code}; {then}", storage.join(root, name), cache)
        assert child.stdout.readline() == "there\n"
        return child

    user = fetch("a", "sys.stdout.flush(); import time; time.sleep(60)")
    try:
        fetch("b").wait()
        assert copies(cache) == {names["a"], names["b"]}
        unfinished = Path(cache, f".{names['c']}.tmp-{os.uname().nodename}-{2**22 + 1}-0123abcd")
        unfinished.mkdir()
        fetch("c").wait()  # the oldest is in use
        assert copies(cache) == {names["a"], names["c"]}
    finally:
        user.kill()
        user.wait()
    fetch("b").wait()
    assert copies(cache) == {names["b"], names["c"]}
    monkeypatch.setenv("BAR_RAY_CACHE_GB", "plenty")
    with pytest.raises(StorageError, match=r"BAR_RAY_CACHE_GB is 'plenty'.*\n.*how many GB"):
        storage.fetch(storage.join(root, "a"), cache)


def test_large_files_are_uploaded_in_bounded_memory(s3: str, tmp_path: Path) -> None:
    code = """
import re, sys; from bar_ray import storage
from bar_ray.cluster.run import Run
from bar_ray.graph import Step
from bar_ray.recipe import Recipe
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
before = peak()
storage.commit(sys.argv[1], sys.argv[2], {})
print(peak() - before)
"""
    (tmp_path / "w").mkdir()
    with open(tmp_path / "w/large", "wb") as large:
        large.truncate(128 << 20)
    child = run_python(code, str(tmp_path / "w"), f"s3://bkt/{tmp_path.name}{s3}")
    assert int(child.communicate(timeout=60)[0]) < 90, "MiB more than before the upload"


def test_foreseeable_failures_are_two_lines_and_lose_nothing(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uris, "S3_ATTEMPTS", 1)  # for the endpoint where nobody answers
    (tmp_path / "file").write_text("")
    wrong = {
        str(tmp_path / "file/store"): "a file is where",
        "/proc/store": "cannot",
        f"s3://missing/store{s3}": "create the bucket",
    }
    for uri, words in wrong.items():
        work = work_dir(tmp_path / "w", a="1")
        for use in (storage.check_writable, partial(storage.commit, work, info={})):
            with pytest.raises(StorageError) as failure:
                use(uri=uri)
            assert words in str(failure.value) and uri.partition("?")[0] in str(failure.value)
            assert str(failure.value).count("\n") == 1 and failure.value.__cause__
        assert os.listdir(work) == ["a"]
    with pytest.raises(StorageError, match=r"bkt/x: .*\ncheck the endpoint"):
        storage.read_bytes("s3://key:secret@bkt/x?endpoint_override=127.0.0.1:1&scheme=http")
    with pytest.raises(StorageError, match="not a directory"):
        storage.commit(str(tmp_path / "nowhere"), str(tmp_path / "x"), {})
    done = str(tmp_path / "w/done")
    for overlapping in (done, str(tmp_path / "w"), str(tmp_path / "w/done/deeper")):
        storage.commit(work_dir(tmp_path / "v", a="1"), done, {})
        with pytest.raises(StorageError, match="one holds the other"):
            storage.commit(done, overlapping, {})
        assert storage.verify(done)
    with pytest.raises(StorageError, match="check the path"):
        storage.read_bytes(str(tmp_path / "nothing"))
    assert sorted(os.listdir(tmp_path)) == ["file", "w"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, small_disk: Path) -> None:
    work = work_dir(tmp_path / "w", a="1" * 2_000_000)
    with pytest.raises(StorageError, match="full: free some space"):
        storage.commit(work, str(small_disk / "artifact"), {})
    assert os.listdir(small_disk) == [] and os.listdir(work) == ["a"]
    # From another device.
    storage.commit(work_dir(tmp_path / "v", a="1"), str(small_disk / "artifact"), {})
    assert storage.verify(str(small_disk / "artifact")) and not (tmp_path / "v").exists()


def test_a_disk_that_fills_up_while_a_step_writes(small_disk: Path) -> None:
    import torch

    from bar_ray.model import tensors

    run = Run("r1", Recipe(), None, "")
    step = Step("merge", "merged", {}, storage_uri=str(small_disk))
    with (
        pytest.raises(StorageError, match=r"cannot write to .*\n.*full: free some space"),
        run.output(step) as folder,
    ):
        tensors.save(Path(folder, "model.safetensors"), {"a": torch.zeros(1_000_000)})
    assert os.listdir(small_disk / "tmp") == [] and not storage.exists(step.artifact.uri)
    with pytest.raises(OSError, match="No such file"), run.output(step) as folder:
        Path(folder, "a/b").write_text("what has nothing to do with space stays as it is")


def test_what_a_killed_process_was_making_goes(tmp_path: Path) -> None:
    code = "import sys; from bar_ray import storage; print(storage.scratch(*sys.argv[1:]))"
    [left] = run_python(code, str(tmp_path)).communicate(timeout=30)[0].splitlines()
    mine = storage.scratch(str(tmp_path))
    assert not os.path.exists(left)
    other = storage.scratch(str(tmp_path))
    assert os.path.isdir(mine) and os.path.isdir(other)  # their process is at work


def test_bytes_stay_as_they_are_whatever_the_name(root: str, tmp_path: Path) -> None:
    manifest = storage.commit(
        work_dir(tmp_path / "w", **{"a.gz": "not gzip", "b c%": "x"}), root, {}
    )
    assert manifest.files["a.gz"]["size"] == 8
    local = storage.fetch(root, str(tmp_path / "cache"))
    assert Path(local, "a.gz").read_text() == "not gzip" and Path(local, "b c%").read_text() == "x"
    assert storage.read_bytes(storage.join(root, manifest.data, "a.gz")) == b"not gzip"


def test_links_are_committed_as_files(tmp_path: Path) -> None:
    work_dir(tmp_path / "blobs", a="1")
    (tmp_path / "w").mkdir()
    (tmp_path / "w/a").symlink_to("../blobs/a")
    storage.commit(str(tmp_path / "w"), str(tmp_path / "far/away/store"), {})
    assert (tmp_path / "far/away/store/a").read_text() == "1"
    assert (tmp_path / "blobs/a").read_text() == "1"


def test_fingerprints_of_data(root: str, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl", "notes.txt"):
        storage.write_bytes(storage.join(root, name), name.encode())
        storage.write_bytes(storage.join(str(tmp_path / "copy"), name), name.encode())
    prints = {}
    for place in ("a.jsonl", "b.jsonl", "deep", ""):
        prints[place] = storage.fingerprint_files(storage.join(root, place))
        assert prints[place] == storage.fingerprint_files(f"{tmp_path}/copy/{place}")
    assert len(set(prints.values())) == 4
    chosen = storage.fingerprint_files(root, (".jsonl",))
    storage.write_bytes(storage.join(root, "notes.txt"), b"other notes")
    assert storage.fingerprint_files(root, (".jsonl",)) == chosen
    storage.write_bytes(storage.join(root, "a.jsonl"), b"A.jsonl!")
    assert storage.fingerprint_files(storage.join(root, "a.jsonl")) != prints["a.jsonl"]
    assert storage.fingerprint_files(root) != prints[""]
    with pytest.raises(UserError, match="no data at"):
        storage.fingerprint_files(storage.join(root, "missing"))
