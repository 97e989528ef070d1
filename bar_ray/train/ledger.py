"""Checkpoints of a running stage: committed, verified, the newest whole one wins.

They live beside the artifacts under the step's fingerprint and go once the artifact is there. Each
is an artifact of its own, with its manifest written last, so a kill at any moment leaves either a
whole checkpoint or none. Uploads go on beside training, one at a time. A damaged checkpoint is
moved to `<storage>/quarantine/`, to be looked at.
"""

import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from bar_ray import storage
from bar_ray.graph import Step


class Ledger:
    """The checkpoints of one step.

    Args:
        keep_last: how many of the newest are kept.
    """

    def __init__(self, step: Step, keep_last: int = 2) -> None:
        self.keep_last = keep_last
        place = (step.verb, step.name, step.fingerprint)
        self.uri = storage.join(step.storage_uri, "checkpoints", *place)
        self.quarantine = storage.join(step.storage_uri, "quarantine", *place)
        self.staging = storage.staging_folder(step.storage_uri)
        self.commit_s = 0.0  # the longest upload so far
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._upload: Future[None] | None = None

    def begin_commit(self, folder: str, step: int, keep: int, then: Callable[[], None]) -> None:
        """Publish a checkpoint folder while training goes on; `then` is called once it is there."""
        self.wait()

        def work() -> None:
            started = time.monotonic()
            try:
                self.commit(folder, step, {}, keep)
            finally:
                storage.discard(folder)
            self.commit_s = max(self.commit_s, time.monotonic() - started)
            then()

        self._upload = self._thread.submit(work)

    def wait(self) -> None:
        """Return when the upload that was begun has ended; raise what went wrong with it."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def commit(self, folder: str, step: int, info: dict[str, Any], keep: int = 0) -> None:
        """Publish a checkpoint folder, then drop all but the newest and the one at `keep`."""
        storage.commit(folder, self._at(step), {"step": step, **info})
        for old in self.steps()[: -self.keep_last]:
            if old != keep:
                storage.delete(self._at(old))

    def close(self) -> None:
        """Let the last upload end, whatever comes of it."""
        self._thread.shutdown()

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first; unfinished uploads are not among them."""
        manifests = [f for f in storage.list_files(self.uri, recursive=True) if "MANIFEST" in f]
        return sorted({int(f.rsplit("step-", 1)[1].split("/")[0]) for f in manifests})

    def newest(self) -> tuple[int, list[str]]:
        """The step of the newest checkpoint that verifies (0 if none), and warnings.

        A damaged one goes to quarantine; any other failure to read is raised, as the checkpoint
        may be whole.
        """
        warnings = []
        for step in reversed(self.steps()):
            try:
                self.folder(step)
                return step, warnings
            except storage.Damaged as error:
                aside = storage.join(self.quarantine, f"step-{step:08d}-{uuid.uuid4().hex[:8]}")
                storage.move(self._at(step), aside)
                what = str(error).partition("\n")[0]
                warnings.append(f"the checkpoint at step {step} is set aside in {aside}: {what}")
        return 0, warnings

    def folder(self, step: int) -> str:
        """A local folder with the verified checkpoint of a step."""
        return storage.fetch(self._at(step))

    def clear(self) -> None:
        storage.delete(self.uri)

    def _at(self, step: int) -> str:
        return storage.join(self.uri, f"step-{step:08d}")
