"""One rollout engine: vLLM's `AsyncLLM` inside a Ray actor, tokens in and tokens out.

`ray.remote(RolloutEngine)` is the actor. Log-probabilities are those of the distribution sampled
from (temperature applied, top_p = 1, top_k off), so the learner can form unbiased ratios. Weights
change between two decoding steps without losing requests; each sample says which weights drew
which of its tokens, and the prefix cache is salted by update. vLLM is imported in the constructor
only.
"""

import asyncio
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from bar_ray.rollout.launch import EngineOptions, fitted, launch, local_folder
from bar_ray.rollout.weights import Tensors, shared_files

SHUTDOWN_S = 5.0


class EngineLost(RuntimeError):
    """The engine can no longer serve: replace its actor."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; with a seed, sample j of prompt i has seed + i * n + j.

    Generation ends at `stop_token_ids` only: the engine has no tokenizer to know an end token.
    """

    n: int = 1
    temperature: float = 1.0
    max_tokens: int = 16
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One completion, its end token included.

    `spans` says which weights drew which tokens: (version, first token, end).
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    spans: list[tuple[int, int, int]]


@dataclass(frozen=True)
class EngineHealth:
    """What a supervisor wants to know of an engine that answers."""

    weight_version: int
    num_unfinished: int
    is_paused: bool
    process_ids: list[int]  # those it started
    node_id: str
    process_id: int  # its own


class RolloutEngine:
    """A vLLM engine whose weights follow a learner's."""

    def __init__(self, model_path: str, options: EngineOptions) -> None:
        folder = local_folder(model_path)
        self.options = options = fitted(options, folder)
        self.version = 0
        self._num_updates = 0
        self._request_ids = itertools.count()
        self._open = asyncio.Event()  # closed while weights change
        self._open.set()
        self._updating = asyncio.Lock()
        self._half_loaded = False  # normal during an update
        self._failed = False  # an update ended half loaded
        self._llm, self._core, self._processes = launch(folder, options)

    async def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Sample]]:
        """`sampling.n` completions of each prompt, in the order of the prompts."""
        return await asyncio.gather(
            *(self._complete(prompt, i, sampling) for i, prompt in enumerate(prompts))
        )

    async def _complete(self, prompt: list[int], index: int, sampling: Sampling) -> list[Sample]:
        from vllm import SamplingParams

        params = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=-1,
            max_tokens=sampling.max_tokens,
            seed=None if sampling.seed is None else sampling.seed + index * sampling.n,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # else an end token of generation_config.json would stop it too
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
        )
        outputs = (await self._run(prompt, params)).outputs
        while any(o.finish_reason == "abort" for o in outputs):  # by an update that began afresh
            outputs = (await self._run(prompt, params)).outputs
        return [
            Sample(list(o.token_ids), list(o.logprobs.logprobs), o.finish_reason, _spans(o))
            for o in outputs
        ]

    async def logprobs(
        self, sequences: Sequence[list[int]], prompt_lengths: Sequence[int]
    ) -> list[list[float]]:
        """Log-probabilities at temperature 1 of each sequence's tokens after its prompt.

        vLLM never reads its prefix cache for these, so they speak for the current weights. A
        sequence must leave room for one more token in `max_model_len`.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        runs = await asyncio.gather(*(self._run(sequence, params) for sequence in sequences))
        return [
            _chosen_logprobs(output.prompt_logprobs, sequence, start)
            for output, sequence, start in zip(runs, sequences, prompt_lengths, strict=True)
        ]

    async def _run(self, tokens: list[int], params: Any) -> Any:
        """vLLM's final output for one request."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        await self._open.wait()
        self._require_sound()
        if len(tokens) >= self.options.max_model_len:
            limit = self.options.max_model_len
            raise ValueError(f"{len(tokens)} tokens leave no room in max_model_len {limit}")
        params.output_kind = RequestOutputKind.FINAL_ONLY
        prompt = tokens_input(list(tokens), cache_salt=f"update-{self._num_updates}")
        stream = self._llm.generate(prompt, params, str(next(self._request_ids)))
        with self._losses():
            async for output in stream:
                final = output
        self._require_sound()
        return final

    async def update_weights(
        self, version: int, source: Tensors | str, fresh: bool = False
    ) -> None:
        """Load arrays, a safetensors file or a model folder through shared memory.

        `source` holds whole layers (`complete_layers`). Requests in flight wait and go on, or,
        with `fresh`, are aborted. After an error the weights are neither old nor new: replace the
        engine.
        """
        with shared_files(source, self.options.shm_dir) as paths:
            try:
                await self.start_update(fresh)
                await self.load_update({"paths": paths})
                await self.finish_update(version)
            finally:
                if self._half_loaded:
                    await self.abandon_update()

    async def set_version(self, version: int) -> None:
        """The weights stay and are from now on called `version`."""
        await self._llm.update_weight_version(str(version))
        self.version = version

    async def start_update(self, fresh: bool = False) -> None:
        """Hold every request where it is and make the layers ready to be loaded.

        `fresh` is for repairing a bad push: it aborts the requests and zeroes the key-value cache.
        A NaN in a page outlives the weights that made it, as 0 x NaN is NaN for its next owner.
        """
        await self._updating.acquire()
        if self._failed:
            self._updating.release()  # the next in line must hear of it too
        self._require_sound()
        self._half_loaded = True
        self._open.clear()
        mode = "abort" if fresh else "keep"
        await self._llm.pause_generation(mode=mode, clear_cache=fresh)
        if fresh:
            await self._llm.collective_rpc("zero_kv_cache")
        await self._llm.start_weight_update()

    async def load_update(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Receive one chunk of weights; `update_info` is the transfer backend's own."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest(update_info))

    async def finish_update(self, version: int) -> None:
        """Put the new weights to use, stamp them, and let the requests go on."""
        await self._llm.finish_weight_update(str(version))
        await self._llm.resume_generation()
        self.version = version
        self._num_updates += 1
        self._half_loaded = False
        self._open.set()
        self._updating.release()

    async def abandon_update(self) -> None:
        """Fail every request rather than go on with half an update."""
        self._failed = True
        self._open.set()
        if self._updating.locked():
            self._updating.release()
        await self._llm.pause_generation(mode="abort", clear_cache=False)

    def _require_sound(self) -> None:
        if self._failed:
            raise EngineLost("a weight update failed half way: replace the engine")

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Give the death of the core a name that callers can unpickle without vLLM."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError:
            cause = "see the log of its process" if self._core is None else repr(self._core.error)
            raise EngineLost(f"the engine core died ({cause}): replace the engine") from None

    async def checksums(self) -> dict[str, str]:
        """What the engine was last given: a digest per tensor, to find one left out or stale.

        `tensor_digest` of each pushed tensor under its Hugging Face name: vLLM may have packed or
        fused the weights by then.
        """
        return (await self._llm.collective_rpc("pushed_digests"))[0]

    async def health(self, deadline_s: float = 60) -> EngineHealth:
        """Asks the core itself; `EngineLost` when it is gone, stuck or holds half an update."""
        self._require_sound()
        with self._losses():
            try:
                is_paused = await asyncio.wait_for(self._llm.is_paused(), deadline_s)
            except TimeoutError:
                await self._llm.check_health()  # a core that dies leaves such calls unanswered
                raise EngineLost(f"the engine core is silent for {deadline_s:g} s") from None
        return EngineHealth(
            weight_version=self.version,
            num_unfinished=self._llm.get_num_unfinished_requests(),
            is_paused=is_paused,
            process_ids=[p.pid for p in self._processes],
            node_id=ray.get_runtime_context().get_node_id(),
            process_id=os.getpid(),
        )

    async def shutdown(self) -> None:
        """End the engine and every process it started."""
        import psutil

        if self._core is not None:
            self._core.stop(SHUTDOWN_S)
        self._llm.shutdown(timeout=SHUTDOWN_S)
        for process in self._processes:
            if process.is_running():
                process.kill()
        psutil.wait_procs(self._processes, timeout=SHUTDOWN_S)


def _spans(output: Any) -> list[tuple[int, int, int]]:
    """vLLM labels what it draws with the weight version; before the first update, "default"."""
    return [
        (int(span.version) if span.version.isdigit() else 0, span.start, span.end)
        for span in output.weight_versions
    ]


def _chosen_logprobs(flat: Any, tokens: list[int], start: int) -> list[float]:
    """The log-probability of `tokens[i]` at each position i from `start` on."""
    chosen = []
    for i in range(start, len(tokens)):
        entries = range(flat.start_indices[i], flat.end_indices[i])
        chosen.append(next(flat.logprobs[j] for j in entries if flat.token_ids[j] == tokens[i]))
    return chosen
