"""The learner of RLVR: from graded rollouts to updates, pushes of weights and checkpoints."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bar_ray import families
from bar_ray.data.batches import MicroBatch
from bar_ray.graph import Step
from bar_ray.recipe import Rlvr
from bar_ray.rollout.records import Trajectory
from bar_ray.rollout.source import KeptRollouts, LiveRollouts
from bar_ray.rollout.sync import NUM_CANARIES, Canary, WeightSync
from bar_ray.rollout.weights import Tensors, as_array, complete_layers
from bar_ray.stages import lm
from bar_ray.types import UserError


class Learner(lm.Worker):
    """One rank of the learner; the first one talks to the sampler."""

    stage: Rlvr

    def __init__(self, step: Step, run: Any, sampler: Any) -> None:
        super().__init__(step, run)
        self.rollouts: LiveRollouts | KeptRollouts = (
            KeptRollouts(run.locate(step, "replay"), self.stage)
            if sampler is None
            else LiveRollouts(sampler, self.stage)
        )
        self.consumed: list[list[dict[str, Any]]] = []  # by step: place, prompt_id, learned
        self.scores: dict[int, float] = {}  # on the held-out prompts, by step
        self.scoring: tuple[int, Any] | None = None
        self.reference: dict[str, torch.Tensor] = {}

    def prepare(self) -> int:
        return lm.from_first_rank(self.rollouts.open)

    def start(self, state: dict[str, Any]) -> None:
        """Engines get the learner's weights before the first prompt, also after a resume."""
        self.consumed = state.get("consumed", [])
        self.scores = {int(step): score for step, score in state.get("scores", {}).items()}
        self.sync = WeightSync(
            self.rollouts,
            self._changed,
            self._everything,
            self._canary_logprobs,
            self.stage.grpo.canary_tolerance,
            lambda event, **fields: self.run.event(event, self.step, **fields),
        )

        def begin() -> None:
            self.rollouts.start(state.get("line", {}), self.engine.step)
            self.sync.push(self.engine.step, fresh=bool(state))

        lm.from_first_rank(begin)

    def before_resume(self) -> None:
        """Keep the weights the stage begins with, for the KL penalty; the anchor is shared."""
        there = self.engine.model.config.max_position_embeddings
        if self.stage.seq_len > there:  # training would go on, but vLLM refuses to sample
            raise UserError(
                f"{self.step.label}: seq_len is {self.stage.seq_len}, but the model has positions "
                f"for {there} tokens (max_position_embeddings)"
            )
        if self.stage.grpo.kl:
            trained = (p for p in self.engine.model.parameters() if p.requires_grad)
            self.reference = {id(p): p.detach().clone() for p in trained}

    def checkpoint_state(self) -> dict[str, Any]:
        line = self.rollouts.state() if self.rank == 0 else {}
        return {"consumed": self.consumed, "line": line, "scores": self.scores}

    # --- one step --------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float] | None:
        """Rollouts, the updates, the push and the canary; None when there are no more prompts."""
        batch = lm.from_first_rank(lambda: self.rollouts.batch(self.engine.step))
        if not batch.consumed:
            return None
        self.consumed.append([asdict(each) for each in batch.consumed])
        settings = self.stage.grpo
        trajectories = batch.trajectories(settings.advantage, settings.mask_truncated)
        started = time.monotonic()
        metrics = self._learn(trajectories)
        metrics["train_s"] = time.monotonic() - started
        metrics |= lm.from_first_rank(lambda: self._hand_over(trajectories))
        tokens = sum(len(t.prompt) + len(t.completion) for t in trajectories)
        return {**batch.metrics, **metrics, "tokens": tokens}

    def _hand_over(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """Give the engines what was learned; the score of the weights before must be in by then."""
        found = self._end_score()
        if not self.sync.canaries:
            # An engine needs room for one token behind a sequence to tell its log-probabilities.
            short = [t for t in trajectories if len(t.prompt + t.completion) < self.stage.seq_len]
            chosen = short[:NUM_CANARIES]
            self.sync.canaries = [Canary(t.prompt + t.completion, len(t.prompt)) for t in chosen]
        if trajectories:
            found |= self.sync.synchronise(self.engine.step)
        else:  # nothing was learned: the weights are those the engines have
            self.rollouts.push(self.engine.step, [])
        if self._is_scored(self.engine.step):
            self.scoring = self.engine.step, self.rollouts.begin_score()
        return found

    def _learn(self, trajectories: list[Trajectory]) -> dict[str, float]:
        """The updates of one batch; a batch without signal changes nothing."""
        if not trajectories:
            self.engine.skip_step()
            return {}
        parts = minibatches(trajectories, self.stage.grpo.minibatches)
        metrics: list[dict[str, float]] = []
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            metrics.append({**self._update(part), **self.engine.optim_step(is_last)})
        return {k: sum(m[k] for m in metrics) / len(metrics) for k in metrics[0]}

    def _update(self, part: list[Trajectory]) -> dict[str, float]:
        """The gradient of one minibatch."""
        from bar_ray.train import grpo

        stage, settings = self.stage, self.stage.grpo
        lengths = [len(t.completion) for t in part]
        weights = grpo.token_weights(lengths, settings.normalise, stage.rollout.max_tokens)
        weight_of = {id(t): weight for t, weight in zip(part, weights, strict=True)}
        share = 1 / max(1, sum(lengths))
        rows = pack(part, stage.seq_len)
        rows += [[]] * (-len(rows) % self.world)  # ranks must do equally many backward passes
        mine = rows[self.rank :: self.world]
        size = stage.run.micro_batch
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        # With one minibatch the policy is still the one that the step began with.
        many = settings.minibatches > 1
        micro = [(packed, self._logprobs(packed) if many else None) for packed in parts]

        def loss(one: tuple[Any, torch.Tensor | None]) -> tuple[torch.Tensor, dict[str, float]]:
            tokens, entropy = self._policy_tokens(*one, weight_of)
            value, about = grpo.policy_loss(tokens, settings)
            importance = about["importance"]
            means = {
                "entropy": entropy,
                "gap": (tokens.old - tokens.engine).abs(),
                "importance": importance,
                "importance_capped": importance > (settings.tis_cap or math.inf),
                "ratio_clipped": grpo.is_clipped(about["ratio"], tokens.advantage, settings),
                **({"kl": about["kl"]} if "kl" in about else {}),
            }
            found = {name: float(each.sum()) * share for name, each in means.items()}
            found["importance_max"] = float(importance.max()) if len(importance) else 0.0
            return value, {"loss": float(value.detach()), **found}

        return self.engine.forward_backward(micro, loss)

    def _policy_tokens(
        self, rows: list[list[Trajectory]], old: torch.Tensor | None, weight_of: dict[int, float]
    ) -> tuple[Any, torch.Tensor]:
        """What the policy loss needs, and the entropy at each token."""
        from bar_ray.train.grpo import PolicyTokens
        from bar_ray.train.loss import token_logprobs

        model, device = self.engine.model, self.engine.device
        reference = self._reference_logprobs(rows) if self.reference else None
        batch = as_micro_batch(rows, self.stage.seq_len).to(device)
        current, entropy = token_logprobs(model, batch, self.stage.rollout.temperature)
        flat = [t for row in rows for t in row]

        def per_token(values: list[float]) -> torch.Tensor:
            repeated = [v for t, v in zip(flat, values, strict=True) for _ in t.completion]
            return torch.tensor(repeated, device=device)

        tokens = PolicyTokens(
            current,
            current.detach() if old is None else old,
            torch.tensor([x for t in flat for x in t.logprobs], device=device),
            per_token([t.advantage for t in flat]),
            per_token([weight_of[id(t)] for t in flat]),
            per_token(list(range(len(flat)))).long(),
            reference,
        )
        return tokens, entropy

    @torch.no_grad()
    def _logprobs(self, rows: list[list[Trajectory]], temperature: float = 0.0) -> torch.Tensor:
        """The learner's log-probabilities of every completion token, flat, row by row."""
        from bar_ray.train.loss import token_logprobs

        batch = as_micro_batch(rows, self.stage.seq_len).to(self.engine.device)
        temperature = temperature or self.stage.rollout.temperature
        return token_logprobs(self.engine.model, batch, temperature)[0]

    def _reference_logprobs(self, rows: list[list[Trajectory]]) -> torch.Tensor:
        """The same of the model the stage began with; its weights change places for a moment."""
        trained = [p for p in self.engine.model.parameters() if id(p) in self.reference]
        self._swap(trained)
        try:
            return self._logprobs(rows)
        finally:
            self._swap(trained)

    def _swap(self, parameters: list[torch.nn.Parameter]) -> None:
        for p in parameters:
            p.data, self.reference[id(p)] = self.reference[id(p)], p.data

    # --- weights ---------------------------------------------------------------------------------

    def _changed(self) -> Tensors:
        """What this stage trains, in whole fused layers, as the engines read it."""
        from bar_ray.model import experts, freeze

        every, disk = experts.stacked_tensors(self.engine.model), self._disk_name()
        changed = {experts.stacked_name(name) for name in freeze.trainable(self.engine.model)}
        return {disk(n): as_array(every[n]) for n in complete_layers(changed, every)}

    def _everything(self) -> Tensors:
        from bar_ray.model import experts

        every, disk = experts.stacked_tensors(self.engine.model), self._disk_name()
        return {disk(name): as_array(value) for name, value in every.items()}

    def _disk_name(self) -> Callable[[str], str]:
        """Engines know tensors by their names in files."""
        return families.disk_name(self.engine.model.config.to_dict())

    def _canary_logprobs(self, canaries: list[Canary]) -> list[list[float]]:
        """One at a time: the logits of a long sequence are large."""
        found = []
        for canary in canaries:
            prompt, completion = canary.tokens[: canary.start], canary.tokens[canary.start :]
            rows = [[Trajectory(prompt, completion, [], 0.0)]]
            found.append(self._logprobs(rows, temperature=1.0).tolist())
        return found

    # --- the held-out prompts --------------------------------------------------------------------

    def _is_scored(self, step: int) -> bool:
        stage = self.stage
        if not stage.held_out or stage.replay:  # without engines nothing can be sampled
            return False
        return step % stage.held_out_every == 0 or step == self.num_steps

    def _end_score(self) -> dict[str, float]:
        """The score that is being made, if any."""
        if self.scoring is None:
            return {}
        (step, begun), self.scoring = self.scoring, None
        found = self.rollouts.end_score(begun)
        self.scores[step] = found["held_out"]
        self.run.event("held_out", self.step, at=step, **found)
        return found

    @property
    def best_step(self) -> int:
        """The step with the highest score, the earliest of equals; 0 before the first one."""
        return max(self.scores, key=lambda step: (self.scores[step], -step), default=0)

    def must_checkpoint(self) -> bool:
        """Weights that are being scored must still be there when they turn out the best."""
        keeps_best = self.stage.keep == "best" and self._is_scored(self.engine.step)
        return keeps_best or super().must_checkpoint()

    def before_output(self) -> None:
        """End with the weights the recipe asks for."""
        lm.from_first_rank(self._end_score)
        best = lm.from_first_rank(lambda: self.best_step)
        if self.stage.keep == "best" and best and best != self.engine.step:
            self.engine.load(lm.on_every_rank(lambda: self.ledger.folder(best)))

    def finish_output(self, folder: str) -> None:
        Path(folder, "consumed.json").write_text(json.dumps(self.consumed))
        if self.scores:
            scores = {"by_step": self.scores, "kept": self.engine.step}
            Path(folder, "held_out.json").write_text(json.dumps(scores))


def minibatches(trajectories: list[Trajectory], count: int) -> list[list[Trajectory]]:
    """At most `count` parts of about equal size, in order."""
    size = -(-len(trajectories) // count)
    return [trajectories[i : i + size] for i in range(0, len(trajectories), size)]


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
