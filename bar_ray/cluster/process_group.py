"""Torch's process group of a training run, made without torch in the controller.

`TorchTrainer` imports torch in the process that starts a run and in its controller, seconds of each
stage, one after the other. Only the workers need it. What they run is Ray Train's own;
`tests/test_layers.py` fails when a new Ray brings torch back.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

TIMEOUT_S = 1800  # of a collective, torch's own for gloo and Ray's for both
LEAVE_S = 30.0


class ProcessGroup(BackendConfig):
    """gloo, or NCCL where the workers have GPUs; for a `DataParallelTrainer`.

    It names no `framework`: torch's version would come to the controller, and torch with it.
    """

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroup

    @property
    def train_func_context(self) -> Callable[[], Any]:
        return _on_its_device


class _ProcessGroup(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        has_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_join, address, port, "nccl" if has_gpus else "gloo")

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with contextlib.suppress(GetTimeoutError):  # they end with their processes
            ray.get(worker_group.execute_async(_leave), timeout=LEAVE_S)


def _join(address: str, port: int, backend: str) -> None:
    """In each worker at once, as it returns when all have joined."""
    from ray.train.torch import config

    config._set_torch_distributed_env_vars()
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    context = ray.train.get_context()
    config._setup_torch_process_group(
        backend, context.get_world_rank(), context.get_world_size(), "env://", TIMEOUT_S
    )


def _leave() -> None:
    import torch.distributed
    from ray.train.torch import config

    is_shared = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    config._shutdown_torch(destroy_process_group=is_shared)


@contextlib.contextmanager
def _on_its_device() -> Iterator[None]:
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield
