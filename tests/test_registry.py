"""The registry of published experts, on a local disk."""

from pathlib import Path

import pytest

from bar_ray import registry, storage
from bar_ray.registry import Version
from bar_ray.types import UserError


def test_versions_grow_and_the_newest_is_last(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert registry.versions(root, "math") == [] and registry.latest(root, "math") is None
    first = registry.publish(root, "math", Version("artifacts/rlvr/math/aa", "aa", ("base", "sft")))
    second = registry.publish(root, "math", Version("artifacts/rlvr/math/bb", "bb"))
    registry.publish(root, "code", Version("artifacts/rlvr/code/cc", "cc"))
    assert (first.version, second.version) == (1, 2) and first.created
    assert registry.versions(root, "math") == [first, second]
    assert registry.latest(root, "math") == second
    assert registry.domains(root) == ["code", "math"]


def test_publishing_again_keeps_the_number_and_takes_the_scores(tmp_path: Path) -> None:
    root = str(tmp_path)
    first = registry.publish(root, "math", Version("a", "aa", scores={"math": 0.4}))
    bytes_before = (tmp_path / "experts" / "math.json").read_bytes()
    assert registry.publish(root, "math", Version("a", "aa")) == first
    assert (tmp_path / "experts" / "math.json").read_bytes() == bytes_before
    again = registry.publish(root, "math", Version("a", "aa", scores={"math": 0.5, "code": 0.1}))
    assert again.version == 1 and again.created == first.created
    assert registry.versions(root, "math") == [again]
    assert again.scores == {"math": 0.5, "code": 0.1}


def test_going_back_to_an_older_version_makes_it_the_latest(tmp_path: Path) -> None:
    root = str(tmp_path)
    for fingerprint in ("aa", "bb", "aa"):
        registry.publish(root, "math", Version("a", fingerprint))
    assert [v.version for v in registry.versions(root, "math")] == [2, 1]
    assert registry.publish(root, "math", Version("a", "cc")).version == 3


@pytest.mark.parametrize("content", [b'{"version": 1}', b'[{"lineage": []}]', b"[", b"[3]"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    place = storage.join(str(tmp_path), "experts", "math.json")
    storage.write_bytes(place, content)
    with pytest.raises(storage.StorageError, match=r"math\.json.*\n.*delete it"):
        registry.latest(str(tmp_path), "math")


def test_a_domain_cannot_leave_the_registry(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot name a domain"):
        registry.publish(str(tmp_path), "../math", Version("a", "aa"))
