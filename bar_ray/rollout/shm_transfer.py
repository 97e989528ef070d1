"""The worker half of the "shm" weight transfer: vLLM loads weights from a shared-memory file.

vLLM imports this module in every worker process, because engines name `RolloutWorker` as their
`worker_extension_cls`; the registration at the bottom is the point of that import. The built-in
transfer engines ("nccl", "ipc") need CUDA, so this is the one that runs on a CPU. It takes the
same road as they do: Hugging Face names, vLLM's layerwise reload, all workers of an engine.
"""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from bar_ray.rollout.weights import tensor_digest


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to rendezvous: sender and receiver meet in the file system."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """Safetensors files to load, each holding whole layers."""

    paths: list[str]


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Loads pushed layers from memory-mapped safetensors files."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.digests: dict[str, str] = {}
        self._kernels: dict[UnquantizedFusedMoEMethod, Any] = {}

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        # On a CPU, vLLM 0.32 packs expert weights only while a MoE method has no kernel yet, and
        # would copy unpacked weights over the packed ones of a live kernel. So the kernels step
        # aside for the update; on CUDA they must stay, as CUDA graphs hold their addresses.
        if self.device.type == "cpu":
            self._kernels = {method: method.moe_kernel for method in self._moe_methods()}
        for method in self._kernels:
            method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        for path in update_info.paths:
            tensors = load_file(path)
            for name, tensor in tensors.items():
                self.digests[name] = tensor_digest(tensor.view(torch.uint8).numpy())
            self.model.load_weights(tensors.items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for method, kernel in self._kernels.items():
            if method.moe_kernel is None:  # a layer this update did not touch
                method.moe_kernel = kernel
        self._kernels = {}

    def shutdown(self) -> None:
        pass

    def _moe_methods(self) -> list[UnquantizedFusedMoEMethod]:
        methods = (getattr(module, "quant_method", None) for module in self.model.modules())
        return [method for method in methods if isinstance(method, UnquantizedFusedMoEMethod)]


class RolloutWorker:
    """What vLLM mixes into its worker; naming it makes vLLM import this module."""

    def pushed_digests(self) -> dict[str, str]:
        return self.weight_transfer_engine.digests

    def zero_kv_cache(self) -> None:
        for cache in self.model_runner.kv_caches:
            cache.zero_()


WeightTransferEngineFactory.register_engine("shm", ShmWeightTransferEngine)
