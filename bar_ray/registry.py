"""Published experts: one small JSON file per domain, newest version last.

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
from bar_ray.config import DOMAIN_NAME
from bar_ray.types import UserError


@dataclass(frozen=True)
class Version:
    """One published expert. `artifact` is relative to the storage root, so that storage can move.

    `version` and `created` are given by `publish`.
    """

    artifact: str
    fingerprint: str
    lineage: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    version: int = 0
    created: str = ""


def _place(storage_uri: str, domain: str) -> str:
    if not re.fullmatch(DOMAIN_NAME, domain):
        raise UserError(f"{domain!r} cannot name a domain: use letters, digits, '_', '-' and '.'")
    return storage.join(storage_uri, "experts", f"{domain}.json")


def versions(storage_uri: str, domain: str) -> list[Version]:
    """Everything published for a domain, newest last."""
    place = _place(storage_uri, domain)
    if not storage.exists(place):
        return []
    records: Any = storage.read_json(place)
    try:
        return [Version(**{**record, "lineage": tuple(record["lineage"])}) for record in records]
    except (TypeError, KeyError) as error:
        raise storage.StorageError(
            f"{place} is damaged: {error!r}\ndelete it and run the same command again"
        ) from error


def latest(storage_uri: str, domain: str) -> Version | None:
    """The version published last, None if there is none."""
    return (versions(storage_uri, domain) or [None])[-1]


def publish(storage_uri: str, domain: str, version: Version) -> Version:
    """Make `version` the newest of its domain and return it with its number.

    A fingerprint is published once: again, it keeps its number and takes the new scores.
    """
    known = versions(storage_uri, domain)
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
        storage.write_json(_place(storage_uri, domain), [asdict(v) for v in after])
    return published


def domains(storage_uri: str) -> list[str]:
    """Domains with a published expert, sorted."""
    files = storage.list_files(storage.join(storage_uri, "experts"))
    names = [uri.partition("?")[0].rpartition("/")[2] for uri in files]
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]
