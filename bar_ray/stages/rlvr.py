"""RLVR: GRPO with vLLM engines in their own actors and placement groups, learners in another.

    for each step:  rollouts of this step's prompts  (sampler, engines, rewards)
                    one optimizer step               (learners: Ray Train + DeepSpeed)
                    push the new weights, compare log-probabilities (canary)

Synchronous: every completion comes from the newest weights. Weights are pushed before the first
prompt, also on resume; a checkpoint holds weights, optimizer and the prompts consumed so far.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bar_ray.cluster.resources import placement_groups
from bar_ray.data.batches import MicroBatch
from bar_ray.graph import Step
from bar_ray.recipe import Rlvr
from bar_ray.rollout.engine import RolloutEngine
from bar_ray.rollout.launch import EngineOptions
from bar_ray.rollout.sampler import RolloutBatch, Sampler, Trajectory
from bar_ray.rollout.weights import complete_layers
from bar_ray.stages import lm
from bar_ray.types import UserError

NUM_CANARIES = 8


class CanaryError(UserError):
    """Learner and engine disagree about the same tokens: something is wrong with the weights."""


def run(step: Step, run: Any) -> None:
    """Inputs: `model`; data: prompts by source; settings: stage, seed."""
    folder = run.fetch(step.inputs["model"])
    with rollout_engines(step, run, folder) as engines:
        sampler = Sampler.remote(step, run, engines, folder)
        try:
            lm.train(loop, step, run, sampler=sampler)
        finally:
            ray.kill(sampler)


@contextlib.contextmanager
def rollout_engines(step: Step, run: Any, folder: str) -> Iterator[list[Any]]:
    """One actor and one placement group per engine, gone on every way out."""
    stage: Rlvr = step.settings["stage"]
    rollout = stage.rollout
    bundle = {"CPU": rollout.cpus_per_engine, "GPU": rollout.gpus_per_engine}
    bundles = [{k: v for k, v in bundle.items() if v}] * rollout.num_engines
    options = EngineOptions(
        max_model_len=stage.seq_len + 1,
        max_num_seqs=rollout.max_num_seqs,
        dtype=stage.dtype,
        kv_cache_bytes=None if rollout.gpus_per_engine else int(rollout.kv_cache_gib * 2**30),
        tensor_parallel_size=rollout.tensor_parallel,
        seed=step.settings["seed"],
        enforce_eager=not rollout.gpus_per_engine,
        num_threads=rollout.threads,
    )
    name = f"engines-{step.name}-{step.fingerprint}"
    with placement_groups(bundles, name, lambda line: run.say(step, line)) as groups:
        engines = [
            ray.remote(RolloutEngine)
            .options(
                name=f"engine-{step.name}-{step.fingerprint}-{index}",
                num_cpus=rollout.cpus_per_engine,
                num_gpus=rollout.gpus_per_engine,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group),
            )
            .remote(folder, options)
            for index, group in enumerate(groups)
        ]
        try:
            yield engines
        finally:
            stop(engines)


def stop(engines: list[Any]) -> None:
    """End the engines with the processes they started, then their actors."""
    ray.wait([engine.shutdown.remote() for engine in engines], timeout=15, num_returns=len(engines))
    for engine in engines:
        ray.kill(engine)


def loop(config: dict[str, Any]) -> dict[str, Any]:
    """One Ray Train worker."""
    return lm.run_worker(Learner, **config)


class Learner(lm.Worker):
    """One rank of the learner."""

    def __init__(self, step: Step, run: Any, sampler: Any) -> None:
        super().__init__(step, run)
        self.sampler = sampler
        self.consumed: list[list[str]] = []  # prompt ids by step
        self.canaries: list[Trajectory] = []

    def prepare(self) -> int:
        return ray.get(self.sampler.plan.remote())

    def start(self, state: dict[str, Any]) -> None:
        """Engines get the learner's weights before the first prompt, also after a resume."""
        self.consumed = state.get("consumed", [])
        lm.from_first_rank(self.push)

    def checkpoint_state(self) -> dict[str, Any]:
        return {"consumed": self.consumed}

    def train_step(self) -> dict[str, float]:
        """Rollouts, one optimizer step, the push and the canary."""
        step, started = self.engine.step, time.monotonic()
        batch: RolloutBatch = lm.from_first_rank(lambda: ray.get(self.sampler.batch.remote(step)))
        self.consumed.append(batch.consumed)
        learned = time.monotonic()
        metrics = self.learn(batch)
        train_s = time.monotonic() - learned
        sync_s, gap = lm.from_first_rank(lambda: (self.push(), self.canary(batch)))
        tokens = sum(len(t.prompt) + len(t.completion) for t in batch.trajectories)
        waited = {"rollout_wait_s": learned - started, "train_s": train_s, "sync_s": sync_s}
        return {**batch.metrics, **metrics, **waited, "canary_gap": gap, "tokens": tokens}

    def learn(self, batch: RolloutBatch) -> dict[str, float]:
        """One optimizer step; a batch without signal changes nothing."""
        from bar_ray.train import grpo

        if not batch.trajectories:
            self.engine.skip_step()
            return {}
        settings = self.stage.grpo
        total = sum(len(t.completion) for t in batch.trajectories)
        rows = pack(batch.trajectories, self.stage.seq_len)
        rows += [[]] * (-len(rows) % self.world)  # ranks must do equally many backward passes
        mine = rows[self.rank :: self.world]

        def loss(packed: list[list[Trajectory]]) -> tuple[torch.Tensor, dict[str, float]]:
            tokens = policy_tokens(self.engine, packed, self.stage)
            return grpo.policy_loss(tokens, settings, total)

        size = self.stage.run.micro_batch
        micro = [mine[i : i + size] for i in range(0, len(mine), size)]
        return {**self.engine.forward_backward(micro, loss), **self.engine.optim_step()}

    def push(self) -> float:
        """Send what this stage trains to every engine, in whole fused layers; returns seconds."""
        from bar_ray.model import experts, freeze

        every = experts.disk_tensors(self.engine.model)
        changed = {experts.disk_name(name) for name in freeze.trainable(self.engine.model)}
        sent = {n: every[n].float().cpu().numpy() for n in complete_layers(changed, every)}
        return ray.get(self.sampler.update_weights.remote(self.engine.step, [ray.put(sent)]))

    def canary(self, batch: RolloutBatch) -> float:
        """The mean gap between learner and engines on fixed completions, after every push."""
        self.canaries = self.canaries or batch.trajectories[:NUM_CANARIES]
        if not self.canaries:
            return 0.0
        sequences = [t.prompt + t.completion for t in self.canaries]
        starts = [len(t.prompt) for t in self.canaries]
        asked = self.sampler.logprobs.remote(sequences, starts)
        with torch.no_grad():
            rows = [[[t]] for t in self.canaries]  # one at a time: logits are large
            ours = torch.cat([learner_logprobs(self.engine, r, self.stage, 1.0) for r in rows])
        gaps = [
            float((ours.cpu() - torch.tensor([x for row in theirs for x in row])).abs().mean())
            for theirs in ray.get(asked)
        ]
        tolerance = self.stage.grpo.canary_tolerance
        if not all(gap <= tolerance for gap in gaps):  # a bad push may also give NaN
            raise CanaryError(
                f"after the weight push of step {self.engine.step} the engines' log-probabilities "
                f"are {max(gaps):.3g} away from the learner's on average; at most {tolerance} is "
                "allowed (rlvr.grpo.canary_tolerance). Nothing was trained on them"
            )
        return max(gaps)

    def finish_output(self, folder: str) -> None:
        Path(folder, "consumed.json").write_text(json.dumps(self.consumed))


def pack(trajectories: list[Trajectory], seq_len: int) -> list[list[Trajectory]]:
    """First-fit rows of whole trajectories, at most `seq_len` tokens each."""
    rows: list[list[Trajectory]] = []
    room: list[int] = []
    for t in trajectories:
        length = len(t.prompt) + len(t.completion)
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            rows.append([])
            room.append(seq_len)
            place = len(rows) - 1
        rows[place].append(t)
        room[place] -= length
    return rows


def as_micro_batch(rows: list[list[Trajectory]], seq_len: int) -> MicroBatch:
    """Rows of trajectories as tensors; padding is a document of its own."""
    tokens = torch.zeros(len(rows), seq_len, dtype=torch.long)
    loss, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        used = 0
        for t in row:
            length = len(t.prompt) + len(t.completion)
            tokens[number, used : used + length] = torch.tensor(t.prompt + t.completion)
            loss[number, used + len(t.prompt) : used + length] = 1
            positions[number, used : used + length] = torch.arange(length)
            used += length
        positions[number, used:] = torch.arange(seq_len - used)
    return MicroBatch(tokens, loss, positions)


def learner_logprobs(
    engine: Any, rows: list[list[Trajectory]], stage: Rlvr, temperature: float
) -> torch.Tensor:
    """The learner's log-probabilities of every completion token, flat, row by row."""
    from bar_ray.train.loss import token_logprobs

    batch = as_micro_batch(rows, stage.seq_len).to(engine.device)
    return token_logprobs(engine.model, batch, temperature)


def policy_tokens(engine: Any, rows: list[list[Trajectory]], stage: Rlvr) -> Any:
    """What the policy loss needs; one optimizer step per batch, so old = current."""
    from bar_ray.train.grpo import PolicyTokens

    current = learner_logprobs(engine, rows, stage, stage.rollout.temperature)
    flat = [t for row in rows for t in row]
    sampled = torch.tensor([x for t in flat for x in t.logprobs], device=current.device)
    advantage = torch.tensor([t.advantage for t in flat for _ in t.completion])
    return PolicyTokens(current, current.detach(), sampled, advantage.to(current.device))
