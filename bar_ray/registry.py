"""Published experts and models: one small JSON file for each, newest version last.

A version says which artifact it is, what that was made from and how it scored. It is written once
the expert has its scores, so that people and other runs find it. The file is replaced as a whole.

Left out: a lock across machines. Of two publications of one domain at the same instant one may be
lost; running the same command again repeats it.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from bar_ray import storage
from bar_ray.types import UserError
from bar_ray.validate import DOMAIN_NAME


@dataclass(frozen=True)
class Version:
    """One published expert or model. `artifact` is relative to the storage root, which may move.

    `version` and `created` are given by `publish`.
    """

    artifact: str
    fingerprint: str
    lineage: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    experts: Mapping[str, int] = field(default_factory=dict)  # of a model: their versions, in order
    version: int = 0
    created: str = ""


EXPERTS, MODELS = "experts", "models"
MODEL = "bar"  # the one model of a storage


def _place(storage_uri: str, name: str, kind: str) -> str:
    if not re.fullmatch(DOMAIN_NAME, name):
        raise UserError(f"{name!r} cannot name a domain: use letters, digits, '_', '-' and '.'")
    return storage.join(storage_uri, kind, f"{name}.json")


def versions(storage_uri: str, name: str, kind: str = EXPERTS) -> list[Version]:
    """Everything published for a domain (or a model), newest last."""
    place = _place(storage_uri, name, kind)
    if not storage.exists(place):
        return []
    records: Any = storage.read_json(place)
    try:
        return [Version(**{**record, "lineage": tuple(record["lineage"])}) for record in records]
    except (TypeError, KeyError) as error:
        raise storage.StorageError(
            f"{place} is damaged: {error!r}\ndelete it and run the same command again"
        ) from error


def latest(storage_uri: str, name: str, kind: str = EXPERTS) -> Version | None:
    """The version published last, None if there is none."""
    return (versions(storage_uri, name, kind) or [None])[-1]


def publish(storage_uri: str, name: str, version: Version, kind: str = EXPERTS) -> Version:
    """Make `version` the newest of its name and return it with its number.

    A fingerprint is published once: again, it keeps its number and takes the new scores.
    """
    known = versions(storage_uri, name, kind)
    same = next((v for v in known if v.fingerprint == version.fingerprint), None)
    if same:
        scores = {**same.scores, **version.scores}
        published = replace(version, version=same.version, created=same.created, scores=scores)
    else:
        number = max((v.version for v in known), default=0) + 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        published = replace(version, version=number, created=now)
    after = [v for v in known if v is not same] + [published]
    if after != known:
        storage.write_json(_place(storage_uri, name, kind), [asdict(v) for v in after])
    return published


def domains(storage_uri: str) -> list[str]:
    """Domains with a published expert, sorted."""
    files = storage.list_files(storage.join(storage_uri, "experts"))
    names = [uri.partition("?")[0].rpartition("/")[2] for uri in files]
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]
