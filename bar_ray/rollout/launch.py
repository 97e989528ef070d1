"""Starting vLLM: the options, the environment and the arguments of a rollout engine.

Start-up time was measured, not assumed: a 0.7 M parameter FlexOlmo on two idle cores is ready in
12 s like this and in 27 s with vLLM's defaults, which then compile for 5 s (24 s the first time).
"""

import importlib
import json
import logging
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bar_ray import lean, storage

KV_CACHE_BYTES = 256 * 2**20  # of an offline engine on a CPU
USABLE = 0.92  # of a device's memory, as vLLM has it


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built; every request of it shares these."""

    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    dtype: str = "float32"
    kv_cache_bytes: int | None = None  # None: what `gpu_share` leaves beside the weights
    gpu_share: float = 1.0  # of each device, where others work beside
    tensor_parallel_size: int = 1
    seed: int = 0
    enforce_eager: bool = True
    in_process: bool | None = None  # core on a thread, see local_core.py; None: on a CPU
    shm_dir: str = "/dev/shm"
    num_threads: int = 1

    def __post_init__(self) -> None:
        if self.in_process and self.tensor_parallel_size > 1:
            raise ValueError("tensor parallelism needs worker processes: set in_process=False")


def offline_options(max_model_len: int) -> EngineOptions:
    """Of an engine that answers a set of prompts, on what this machine has."""
    import torch

    on_gpu = torch.cuda.is_available()
    return EngineOptions(
        max_model_len=max_model_len,
        dtype="auto" if on_gpu else "float32",
        enforce_eager=not on_gpu,
        kv_cache_bytes=None if on_gpu else KV_CACHE_BYTES,
    )


def local_folder(place: str) -> str:
    """A model's folder on this node: an artifact is fetched, any other folder stands as it is."""
    return storage.fetch(place) if storage.read_manifest(place) else place


def fitted(options: EngineOptions, folder: str) -> EngineOptions:
    """The options with no more positions than the model has: vLLM refuses more."""
    config = json.loads(Path(folder, "config.json").read_text())
    longest = config.get("max_position_embeddings", options.max_model_len)
    return replace(options, max_model_len=min(options.max_model_len, longest))


def launch(model_path: str, options: EngineOptions) -> tuple[Any, Any, list[Any]]:
    """An AsyncLLM, its core where that lives in this process, and the processes it started."""
    import psutil

    import_vllm(options)
    this = psutil.Process()
    before = this.children(recursive=True)
    in_process = options.in_process
    if in_process is None:
        import torch

        in_process = options.tensor_parallel_size == 1 and not torch.cuda.is_available()
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = AsyncEngineArgs(**engine_arguments(model_path, options))
    if in_process:
        from bar_ray.rollout.local_core import start_local

        llm, core = start_local(args)
    else:
        from vllm.v1.engine.async_llm import AsyncLLM

        llm, core = AsyncLLM.from_engine_args(args), None
    return llm, core, [p for p in this.children(recursive=True) if p not in before]


def import_vllm(options: EngineOptions) -> None:
    """Import it for the first time, with what it reads from the environment then."""
    os.environ |= {
        "OMP_NUM_THREADS": str(options.num_threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # actors share cores; binding would stack them
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    logging.getLogger("vllm").setLevel(logging.ERROR)  # what it says before reading the above
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    if options.tensor_parallel_size == 1:
        # On a CPU vLLM would otherwise put the one worker in a third process (+9 s, +0.6 GB).
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if options.enforce_eager:
        # The sampler's few torch.compile'd functions cost 3 s warm and 24 s cold otherwise.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    with lean.imports():
        importlib.import_module("vllm.engine.arg_utils")


def engine_arguments(model_path: str, options: EngineOptions) -> dict[str, Any]:
    """vLLM's arguments for a lean text engine without a tokenizer."""
    from vllm.config import WeightTransferConfig

    return {
        "model": model_path,
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "seed": options.seed,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "gpu_memory_utilization": USABLE * options.gpu_share,
        # On a CPU, vLLM rewinds the generator of a seeded request whose prompt was cut, which only
        # CUDA generators can do: the core would die.
        "enable_chunked_prefill": None if options.kv_cache_bytes is None else False,
        "tensor_parallel_size": options.tensor_parallel_size,
        # Inside a placement group vLLM would choose Ray and refuse the group's single bundle.
        "distributed_executor_backend": "mp" if options.tensor_parallel_size > 1 else None,
        "enforce_eager": options.enforce_eager,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "weight_transfer_config": WeightTransferConfig(backend="shm"),
        "worker_extension_cls": "bar_ray.rollout.shm_transfer.RolloutWorker",
    }
