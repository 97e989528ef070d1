"""vLLM's engine core on a thread of this process, behind the ordinary `AsyncLLM`.

AsyncLLM puts its core in a process of its own, and on a CPU the worker in a third: each imports
torch and vLLM again. For a tiny model on two idle cores that is 27 s to start and 2.1 GB, against
12 s and 1.0 GB here, and fewer tokens a second. It also leaves nothing behind when the actor is
killed. Meant for the CPU; on a GPU the core deserves its own process and interpreter
lock. Leans on vLLM 0.32 internals (the handshake), which test_rollout.py exercises.
"""

import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor import Executor


class LocalCore(EngineCoreProc):
    """An engine core that is handed its sockets' addresses instead of asking for them."""

    def __init__(self, config: VllmConfig, addresses: EngineZmqAddresses) -> None:
        self._local_addresses = addresses
        self.error: BaseException | None = None
        executor = Executor.get_class(config)
        super().__init__(config, True, "", executor, log_stats=False)
        self._thread = threading.Thread(target=self._serve, name="engine-core", daemon=True)
        self._thread.start()

    @contextmanager
    def _perform_handshakes(self, *_: object) -> Iterator[EngineZmqAddresses]:
        yield self._local_addresses

    def _serve(self) -> None:
        try:
            self.run_busy_loop()  # leaves by SystemExit when asked to stop
        finally:
            if self.is_running():
                self.error = sys.exception()
                self._send_engine_dead()  # so that whoever waits for a request is told
            self.shutdown()

    def stop(self, timeout_s: float) -> None:
        """Abort all requests and end the thread."""
        self.shutdown_state = EngineShutdownState.REQUESTED
        self.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
        self._thread.join(timeout_s)


def start_local(args: AsyncEngineArgs) -> tuple[AsyncLLM, LocalCore]:
    """An AsyncLLM and the core it talks to, both in this process."""
    config = args.create_engine_config()
    # Abstract Unix sockets ("@") leave no file behind, however the process ends.
    inputs, outputs = (f"ipc://@bar_ray-{uuid.uuid4()}" for _ in range(2))
    core = LocalCore(config, EngineZmqAddresses(inputs=[inputs], outputs=[outputs]))
    llm = AsyncLLM(
        config,
        Executor.get_class(config),
        log_stats=False,
        log_requests=False,
        client_addresses={"input_address": inputs, "output_address": outputs},
    )
    return llm, core
