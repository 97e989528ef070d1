"""What a storage may forget: artifacts that nothing refers to, and what ended work left behind.

Kept is what a recipe plans, what the newest runs planned, the newest versions of every published
expert and the best one, and everything those were made from. Whatever else is old enough may go:
it can be made again from its settings.
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bar_ray import registry, storage
from bar_ray.graph import Step, topological
from bar_ray.log import duration
from bar_ray.types import UserError

PLACE = re.compile(r"(artifacts|checkpoints|quarantine)/(?:ray_train|[^/]+/[^/]+)/[^/]+")


@dataclass(frozen=True)
class Garbage:
    """A directory that may be deleted: why, its bytes, and how long ago it was written to."""

    uri: str
    reason: str
    size: int
    age_s: float

    def __str__(self) -> str:
        age = duration(self.age_s)
        return f"{self.size / 1e6:>10,.1f} MB  {age:>7} old  {self.reason:<24}  {self.uri}"


@dataclass(frozen=True)
class Keep:
    """How much of the past is kept, in runs and in versions of each expert."""

    runs: int = 5
    versions: int = 3
    younger_than_s: float = 3600.0


def garbage(root: str, steps: Iterable[Step], keep: Keep) -> list[Garbage]:
    """Everything under a storage root that may be deleted, oldest first."""
    sizes: dict[str, int] = defaultdict(int)
    newest: dict[str, float] = defaultdict(float)
    finished = set()
    for name, size, changed in storage.tree(root):
        if found := PLACE.match(name):
            place = found[0]
            sizes[place] += size
            newest[place] = max(newest[place], changed)
            if name == f"{place}/{storage.MANIFEST}":
                finished.add(place)
    live = referenced(root, steps, keep, finished)
    now = time.time()
    found = [
        Garbage(storage.join(root, place), reason, sizes[place], now - newest[place])
        for place in sizes
        if (reason := _reason(place, live, finished))
    ]
    old = [item for item in found if item.age_s >= keep.younger_than_s]
    return sorted(old, key=lambda item: -item.age_s)


def _reason(place: str, live: set[str], finished: set[str]) -> str:
    """Why a directory may go; empty when it may not."""
    kind, _, name = place.partition("/")
    fingerprint = name.rsplit("/", 1)[-1]
    if kind == "quarantine":
        return "damaged"
    if kind == "checkpoints" and name.startswith("ray_train/"):
        return "of a run that has ended"
    if kind == "checkpoints" and f"artifacts/{name}" in finished:
        return "of a finished step"
    if fingerprint in live:
        return ""
    return "nothing refers to it" if kind == "artifacts" else "of a step nobody plans"


def referenced(root: str, steps: Iterable[Step], keep: Keep, finished: set[str]) -> set[str]:
    """Fingerprints that must stay; `finished` are the places with a manifest."""
    wanted = {step.fingerprint for step in topological(steps)}
    for run in _runs(root)[-keep.runs :] if keep.runs else ():
        wanted |= {entry["fingerprint"] for entry in run.get("plan", ())}
    published = [registry.versions(root, domain) for domain in registry.domains(root)]
    published.append(registry.versions(root, registry.MODEL, registry.MODELS))
    for known in published:
        best = max(known, key=lambda v: v.scores.get("overall", 0.0), default=None)
        for version in (*known[-keep.versions :], best) if keep.versions else ():
            wanted |= {version.fingerprint} if version else set()
            wanted |= {line.split()[-1] for line in version.lineage} if version else set()
    return _with_lineage(root, wanted, finished)


def _runs(root: str) -> list[dict[str, Any]]:
    """The descriptions of all runs, oldest first; one that cannot be read is an error."""
    uris = [
        uri
        for uri in storage.list_files(storage.join(root, "runs"), recursive=True)
        if uri.partition("?")[0].endswith("/run.json")
    ]
    return sorted(map(storage.read_json, uris), key=lambda run: run.get("started", 0.0))


def _with_lineage(root: str, wanted: set[str], finished: set[str]) -> set[str]:
    """The fingerprints and those of everything their artifacts were made from."""
    artifacts = [place for place in finished if place.startswith("artifacts/")]
    places = {place.rsplit("/", 1)[1]: place for place in artifacts}
    live, new = set(), set(wanted)
    while new:
        live |= new
        found: set[str] = set()
        for fingerprint in new & places.keys():
            uri = storage.join(root, places[fingerprint])
            try:
                manifest = storage.read_manifest(uri)
            except storage.Damaged as error:
                raise UserError(f"what {uri} was made from is unknown: {error}") from error
            info = manifest.info if manifest else {}
            found |= set(info.get("inputs", {}).values())
            data = json.dumps(info.get("data", {}))  # kept rollouts, for one, are read by path
            found |= {f for f in places if f"/{f}" in data}
        new = found - live
    return live
