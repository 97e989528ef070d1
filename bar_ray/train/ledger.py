"""Checkpoints of a running stage: committed, verified, the newest whole one wins.

They live beside the artifacts under the step's fingerprint and go once the artifact is there. Each
is an artifact of its own, with its manifest written last, so a kill at any moment leaves either a
whole checkpoint or none.
"""

from typing import Any

from bar_ray import storage
from bar_ray.graph import Step
from bar_ray.storage import StorageError


class Ledger:
    """The checkpoints of one step."""

    def __init__(self, step: Step) -> None:
        self.uri = storage.join(
            step.storage_uri, "checkpoints", step.verb, step.name, step.fingerprint
        )

    def commit(self, folder: str, step: int, info: dict[str, Any]) -> None:
        """Publish a checkpoint folder, then drop all but the two newest."""
        storage.commit(folder, self._at(step), {"step": step, **info})
        for old in self.steps()[:-2]:
            storage.delete(self._at(old))

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first; unfinished uploads are not among them."""
        manifests = [f for f in storage.list_files(self.uri, recursive=True) if "MANIFEST" in f]
        return sorted({int(f.rsplit("step-", 1)[1].split("/")[0]) for f in manifests})

    def newest(self) -> tuple[str, list[str]]:
        """A local folder with the newest checkpoint that verifies ('' if none), and warnings."""
        warnings = []
        for step in reversed(self.steps()):
            try:
                return storage.fetch(self._at(step)), warnings
            except StorageError as error:
                warnings.append(f"checkpoint at step {step} is damaged and dropped: {error}")
                storage.delete(self._at(step))
        return "", warnings

    def clear(self) -> None:
        storage.delete(self.uri)

    def _at(self, step: int) -> str:
        return storage.join(self.uri, f"step-{step:08d}")
