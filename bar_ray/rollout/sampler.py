"""The sampler: prompts in a fixed order, completions from the engines, rewards, advantages.

One actor per RLVR stage. Which prompts belong to a step is a function of (seed, step), so resuming
needs no state here and no prompt is left out or repeated. Learners ask for the batch of a step;
every rank that asks gets the same one.
"""

from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from time import monotonic
from typing import Any

import numpy as np
import ray

from bar_ray import rewards
from bar_ray.data import chat, formats
from bar_ray.data.mixture import Mixture, steps_of
from bar_ray.recipe import Rlvr
from bar_ray.rollout.engine import Sampling
from bar_ray.train.grpo import advantages
from bar_ray.types import OUTCOMES, UserError

GENERATE_DEADLINE_S = 1800.0
SYNC_DEADLINE_S = 300.0


@dataclass(frozen=True)
class Prompt:
    """One task: tokens to continue, and how to grade the continuation."""

    id: str
    tokens: list[int]
    ground_truth: Any
    verifier: str


@dataclass(frozen=True)
class Trajectory:
    """One graded completion; `logprobs` are the engine's, one per completion token."""

    prompt_id: str
    prompt: list[int]
    completion: list[int]
    logprobs: list[float]
    advantage: float
    reward: float
    weight_version: int


@dataclass(frozen=True)
class RolloutBatch:
    """What one optimizer step learns from, the prompts it consumed, and numbers about it."""

    step: int
    trajectories: list[Trajectory]
    consumed: list[str]
    metrics: dict[str, float]


def load_prompts(folder: str, uris: dict[str, str], longest: int) -> dict[str, list[Prompt]]:
    """The prompts of each source as tokens; those longer than `longest` are left out."""
    tokenizer = chat.load_tokenizer(folder)
    found: dict[str, list[Prompt]] = {}
    for name, uri in uris.items():
        prompts = []
        for number, row in enumerate(formats.read_rows(uri, "prompts")):
            check(row, uri, number)
            tokens = chat.prompt(tokenizer, row)
            truth, identity = row.get("ground_truth"), str(row.get("id", f"{name}-{number}"))
            if len(tokens) <= longest:
                prompts.append(Prompt(identity, tokens, truth, row["verifier"]))
        if not prompts:
            raise UserError(f"{uri} has no prompt of at most {longest} tokens")
        found[name] = prompts
    return found


def check(row: dict[str, Any], uri: str, number: int) -> None:
    """Refuse a prompt whose verifier cannot work with its ground truth, saying which row."""
    try:
        rewards.validate(row["verifier"], row.get("ground_truth"))
    except UserError as error:
        raise UserError(f"{uri} row {number + 1}: {error}") from error


@ray.remote(num_cpus=0)
class Sampler:
    """Owns the order of prompts; talks to the engines and the rewards."""

    def __init__(self, step: Any, run: Any, engines: list[Any], folder: str) -> None:
        self.step, self.run, self.engines, self.folder = step, run, engines, folder
        self.stage: Rlvr = step.settings["stage"]
        self.seed = step.settings["seed"]
        self.num_steps = 0
        self.batches: dict[int, RolloutBatch] = {}

    def plan(self) -> int:
        """The number of optimizer steps; reads the prompts the first time.

        Not in the constructor: what goes wrong there reaches nobody.
        """
        if not self.num_steps:
            self._load()
        return self.num_steps

    def _load(self) -> None:
        stage = self.stage
        self.tokenizer = chat.load_tokenizer(self.folder)
        uris = {name: self.run.locate(self.step, name) for name in self.step.data}
        prompts = load_prompts(self.folder, uris, stage.seq_len - stage.rollout.max_tokens)
        self.sources = list(prompts.values())
        sizes = [len(source) for source in self.sources]
        self.num_steps = steps_of(stage.steps, stage.epochs, stage.batch_size, sum(sizes))
        shares = [stage.data[name] for name in prompts]
        self.mixture = Mixture(sizes, shares, self.num_steps * stage.batch_size, self.seed)
        self.sandbox = rewards.sandbox_for(self.run.recipe.sandbox)

    def prompts_of(self, step: int) -> list[Prompt]:
        places = range(step * self.stage.batch_size, (step + 1) * self.stage.batch_size)
        mixture = self.mixture
        return [self.sources[mixture.source[p]][mixture.row[p]] for p in places]

    def update_weights(self, version: int, boxed: list[Any]) -> float:
        """Push weights to every engine; returns seconds. Late engines are named.

        `boxed` holds one reference: passed on as it is, the arrays are never copied here.
        """
        started, (weights_ref,) = monotonic(), boxed
        refs = [engine.update_weights.remote(version, weights_ref) for engine in self.engines]
        wait_all(refs, SYNC_DEADLINE_S, "weight update")
        return monotonic() - started

    def logprobs(self, sequences: list[list[int]], starts: list[int]) -> list[list[list[float]]]:
        """Each engine's log-probabilities of the same sequences, for the canary."""
        refs = [engine.logprobs.remote(sequences, starts) for engine in self.engines]
        return wait_all(refs, SYNC_DEADLINE_S, "log-probabilities")

    def batch(self, step: int) -> RolloutBatch:
        """The rollouts of a step, made when first asked for."""
        if step not in self.batches:
            self.batches = {step: self._roll_out(step)}
        return self.batches[step]

    def _roll_out(self, step: int) -> RolloutBatch:
        started = monotonic()
        prompts = self.prompts_of(step)
        groups = self._generate(step, prompts)
        generated = monotonic()
        items = [
            (chat.completion_text(self.tokenizer, s.token_ids), p.ground_truth, p.verifier)
            for p, group in zip(prompts, groups, strict=True)
            for s in group
        ]
        verdicts = iter(rewards.grade(items, self.sandbox))
        trajectories, outcomes, scores, num_flat = [], Counter(), [], 0
        for prompt, group in zip(prompts, groups, strict=True):
            graded = [next(verdicts) for _ in group]
            outcomes.update(v.outcome for v in graded)
            rewards_G = [v.score for v in graded]
            scores.extend(rewards_G)
            if max(rewards_G) == min(rewards_G):
                num_flat += 1  # no signal in this group: every advantage is zero
                continue
            advantages_G = advantages(rewards_G, self.stage.grpo.advantage)
            trajectories += [
                Trajectory(
                    prompt.id, prompt.tokens, s.token_ids, s.logprobs, a, r, s.weight_version
                )
                for s, a, r in zip(group, advantages_G, rewards_G, strict=True)
            ]
        samples = [s for group in groups for s in group]
        metrics = {
            "reward": fmean(scores),
            "zero_variance": num_flat / len(prompts),
            "truncated": fmean(s.finish_reason == "length" for s in samples),
            "length": fmean(len(s.token_ids) for s in samples),
            "rollout_s": generated - started,
            "grade_s": monotonic() - generated,
            **{f"outcome/{name}": outcomes[name] / len(samples) for name in OUTCOMES},
        }
        return RolloutBatch(step, trajectories, [p.id for p in prompts], metrics)

    def _generate(self, step: int, prompts: list[Prompt]) -> list[list[Any]]:
        """Completions by prompt; prompts are dealt to the engines in turn."""
        rollout, num = self.stage.rollout, len(self.engines)
        refs = []
        for index, engine in enumerate(self.engines):
            sampling = Sampling(
                n=self.stage.grpo.samples,
                temperature=rollout.temperature,
                max_tokens=rollout.max_tokens,
                seed=sampling_seed(self.seed, step, index),
                stop_token_ids=tuple(chat.stop_ids(self.tokenizer)),
            )
            refs.append(engine.generate.remote([p.tokens for p in prompts[index::num]], sampling))
        answers = wait_all(refs, GENERATE_DEADLINE_S, "generation")
        return [answers[i % num][i // num] for i in range(len(prompts))]


def sampling_seed(seed: int, step: int, engine: int) -> int:
    """A first seed for the samples of an engine in a step; they count up from it."""
    return int(np.random.SeedSequence([seed, step, engine]).generate_state(1)[0] >> 1)


def wait_all(refs: list[Any], deadline_s: float, what: str) -> list[Any]:
    """Every result within a deadline, or an error that says which engine is late."""
    _, late = ray.wait(refs, num_returns=len(refs), timeout=deadline_s)
    if late:
        numbers = [i for i, ref in enumerate(refs) if ref in late]
        raise TimeoutError(f"{what}: engines {numbers} did not answer within {deadline_s:.0f}s")
    return ray.get(refs)
