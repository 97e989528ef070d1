"""The sampler: which prompt comes next, what it was given for an answer, who may learn from it.

One actor per RLVR stage. Prompts have a place in the order of the whole run, a function of the seed
alone. Engines work ahead of the learner by at most `max_staleness` batches; 0 means that a batch is
sampled from the weights it will train, prompts in order. What is too old when its turn comes is
dropped and its prompt goes back in line. Groups without signal are consumed and, with `refill`,
replaced. The learner keeps `state()` with its checkpoints: what is restored from it leaves no
prompt out and repeats none.
"""

import asyncio
import contextlib
import functools
import heapq
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from bar_ray import storage
from bar_ray.cluster.pool import holder
from bar_ray.cluster.sharing import PoolClient
from bar_ray.data import chat
from bar_ray.data.mixture import Mixture, steps_of
from bar_ray.recipe import Rlvr
from bar_ray.rollout.calls import Restarted
from bar_ray.rollout.engine import Sample, Sampling
from bar_ray.rollout.fleet import Fleet
from bar_ray.rollout.graders import Graders
from bar_ray.rollout.launch import EngineOptions
from bar_ray.rollout.records import (
    Completion,
    Group,
    Prompt,
    RolloutBatch,
    describe,
    load_prompts,
)
from bar_ray.rollout.source import kept_name
from bar_ray.types import Verdict

SAY_EVERY_S = 30.0
FOLLOW_EVERY_S = 5.0
SHOWN_CHARACTERS = 4000  # of a text on the board
MOST_DROPS = 5  # a second time is possible, after that something is wrong


class Order:
    """Prompt by place: a pure function of the seed, however long the run becomes."""

    def __init__(self, sources: list[list[Prompt]], shares: list[float], stage: Rlvr, seed: int):
        sizes = [len(source) for source in sources]
        self.sources = sources
        self.num_steps = steps_of(stage.steps, stage.epochs, stage.batch_size, sum(sizes))
        # With steps given, groups without signal are made up for; with epochs, prompts just end.
        extra = 1 + stage.refill if stage.steps else 1
        self.num_places = round(self.num_steps * stage.batch_size * extra)
        self.mixture = Mixture(sizes, shares, self.num_places, seed)

    def __getitem__(self, place: int) -> Prompt:
        return self.sources[self.mixture.source[place]][self.mixture.row[place]]


class Line:
    """The places still to be sampled: those that came back first, then the ones never taken."""

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self.next = 0
        self.again: list[int] = []  # a heap

    def take(self) -> int | None:
        """The next place, None at the end."""
        if self.again:
            return heapq.heappop(self.again)
        if self.next == self.num_places:
            return None
        self.next += 1
        return self.next - 1

    def give_back(self, place: int) -> None:
        heapq.heappush(self.again, place)


class Stopwatch:
    """Seconds during which at least one of many overlapping things was going on: `with watch:`."""

    def __init__(self) -> None:
        self.stopped, self.since, self.going_on = 0.0, 0.0, 0

    def __enter__(self) -> None:
        if self.going_on == 0:
            self.since = time.monotonic()
        self.going_on += 1

    def __exit__(self, *_: object) -> None:
        self.going_on -= 1
        if self.going_on == 0:
            self.stopped += time.monotonic() - self.since

    @property
    def seconds(self) -> float:
        return self.stopped + (time.monotonic() - self.since if self.going_on else 0.0)


class Sampler:
    """Keeps engines and graders busy and puts batches together.

    Args:
        order: prompt by place.
        held_out: prompts that `score` uses.
        fleet, graders: have `generate` and `push`, and `grade`.
        read: token ids of a completion as the text that is graded.
        report: called as `report(event, message, **fields)`.
    """

    def __init__(
        self,
        stage: Rlvr,
        seed: int,
        order: "Order",
        held_out: list[Prompt],
        fleet: Any,
        graders: Any,
        stops: Sequence[int],
        read: Callable[[list[int]], str],
        report: Callable[..., None],
    ) -> None:
        self.stage, self.seed, self.order, self.held_out = stage, seed, order, held_out
        self.fleet, self.graders, self.report = fleet, graders, report
        self.stops, self.read = tuple(stops), read
        self.line = Line(order.num_places)
        self.running: dict[int, asyncio.Task[None]] = {}
        self.began: dict[int, int] = {}  # place -> the weights its sampling began with
        self.finished: dict[int, Group] = {}  # in the order of finishing
        self.drawn: list[Group] = []  # for the batch that is being put together
        self.drops: Counter[int] = Counter()  # place -> how often it came back too old
        self.version = -1  # of the weights; nothing is sampled before the first push
        self.num_batches = self.num_dropped = self.num_restored = 0
        self.generating, self.num_tokens = Stopwatch(), 0
        self.told = (time.monotonic(), 0.0, 0)  # now, generating seconds, tokens at the last batch
        self.failure: BaseException | None = None
        self.news = asyncio.Event()  # a group is finished, or something went wrong

    def state(self) -> dict[str, Any]:
        """Where the line stands and the groups that wait for a learner, as plain JSON.

        Whatever is not consumed by then is either here or will be sampled again.
        """
        pending = [group.to_json() for group in self.finished.values()]
        again = [place for place in self._line()["again"] if place not in self.finished]
        return {"next": self.line.next, "again": again, "pending": pending}

    def restore(self, state: dict[str, Any], num_batches: int) -> None:
        """Go back to a state; what is being sampled is forgotten. The weights come by `push`."""
        self.stop()
        self.line.next, self.line.again = state.get("next", 0), list(state.get("again", ()))
        groups = [Group.from_json(record) for record in state.get("pending", ())]
        self.finished = {group.place: group for group in groups}
        self.num_batches, self.drawn, self.failure = num_batches, [], None
        self.num_restored += 1
        self.version = -1  # nothing is sampled before the weights are there
        self.news.set()

    def stop(self) -> None:
        for task in self.running.values():
            task.cancel()
        self.running = {}

    async def push(self, version: int, weights: list[Any], fresh: bool) -> float:
        """Give the engines new weights, without stopping what they generate; returns seconds."""
        started = time.monotonic()
        await self.fleet.push(version, weights, fresh)
        self.version = version
        self._feed()
        return time.monotonic() - started

    async def batch(self, step: int) -> RolloutBatch:
        """The groups drawn for optimizer step `step`; waits for them.

        A batch ends when it has `batch_size` groups with signal, when as many prompts were drawn
        for it as `refill` allows, or when there are no more. Then it may be short, or empty.
        """
        assert step == self.num_batches, f"batch {step} asked for, {self.num_batches} is next"
        started, restored = time.monotonic(), self.num_restored
        self._take(step)
        self._feed()
        while self._waits(step):
            if not await self._something_finishes():
                where = f"{len(self.running)} prompts at {self.fleet}"
                self.report("", f"step {step} waits for {where}")
            if restored != self.num_restored:
                raise asyncio.CancelledError("the learner that asked is gone")
            self._take(step)
            self._feed()
        drawn, self.drawn = self.drawn, []
        self.num_batches += 1
        self._feed()
        return self._as_batch(step, drawn, time.monotonic() - started)

    def _waits(self, step: int) -> bool:
        """Whether the batch must wait for prompts that are being sampled.

        It also waits for one that was dropped before and would again be too old at the next step:
        otherwise a completion that takes longer than the bound would never be learned from.
        """
        last_chance = step - self.stage.max_staleness
        return bool(self.running) and (
            not self._is_complete()
            or any(self.drops[p] and self.began[p] <= last_chance for p in self.running)
        )

    def _is_complete(self) -> bool:
        size = self.stage.batch_size
        signal = sum(group.has_signal for group in self.drawn)
        return signal >= size or len(self.drawn) >= round(size * (1 + self.stage.refill))

    def _take(self, step: int) -> None:
        """Finished groups for this batch, no more than it needs; those too old go back in line."""
        for group in self._in_turn():
            if step - group.oldest > self.stage.max_staleness:
                del self.finished[group.place]
                self._drop(group)
            elif not self._is_complete() or self.drops[group.place]:
                self.drawn.append(self.finished.pop(group.place))

    def _drop(self, group: Group) -> None:
        """Put a prompt back in line whose completions are too old to be learned from."""
        self.drops[group.place] += 1
        self.num_dropped += 1
        self.line.give_back(group.place)
        if self.drops[group.place] > MOST_DROPS:
            raise RuntimeError(
                f"prompt {group.prompt_id} was sampled {MOST_DROPS + 1} times from weights that "
                "are too old: the engines do not follow the learner"
            )

    def _in_turn(self) -> list[Group]:
        """Synchronous batches take prompts in order; others take what finished first."""
        groups = list(self.finished.values())
        if self.stage.max_staleness:
            return groups
        return sorted(groups, key=lambda group: group.place) if not self.running else []

    def _as_batch(self, step: int, drawn: list[Group], waited: float) -> RolloutBatch:
        metrics = {"rollout_wait_s": waited, **describe(drawn, step)}
        metrics |= {
            "requeued": self.num_dropped,
            "engines_lost": self.fleet.num_lost,
            "graders_lost": self.graders.num_lost,
            "ahead": len(self.finished) + len(self.running),
            **self._throughput(),
        }
        return RolloutBatch(step, drawn, metrics, self._line())

    def _throughput(self) -> dict[str, float]:
        """What the engines did since the last batch."""
        told, self.told = self.told, (time.monotonic(), self.generating.seconds, self.num_tokens)
        passed, busy, tokens = (now - then for now, then in zip(self.told, told, strict=True))
        return {
            "generate_s": busy,
            "engines_idle": 1 - min(1.0, busy / passed) if passed else 0.0,
            "rollout_tokens": tokens,
        }

    def _line(self) -> dict[str, Any]:
        """Every place below `next` that is not in `again` is consumed."""
        again = sorted({*self.line.again, *self.running, *self.finished})
        return {"next": self.line.next, "again": again}

    # --- sampling --------------------------------------------------------------------------------

    def _feed(self) -> None:
        """Start prompts as far as the staleness bound allows.

        Counted in groups with signal; groups without leave room for their replacements.
        """
        if self.version < 0 or (self.stage.max_staleness == 0 and self.running):
            return  # synchronous: in rounds, so that what is drawn does not hang on timing
        size, refill = self.stage.batch_size, self.stage.refill
        batches = self.version + 1 + self.stage.max_staleness - self.num_batches
        there = [*self.finished.values(), *self.drawn]
        signal = sum(group.has_signal for group in there)
        flat = len(there) - signal
        room = size * batches - signal - max(0, flat - round(size * refill * batches))
        while len(self.running) < room and (place := self.line.take()) is not None:
            self.running[place] = asyncio.ensure_future(self._run(place))
            self.began[place] = self.version

    async def _run(self, place: int) -> None:
        """Sample and grade the group of a place."""
        prompt = self.order[place]
        try:
            group = await self._group(place, prompt, self._sampling(place))
            if place not in self.running:
                return
            del self.running[place]
            self.finished[place] = group
        except Exception as error:
            self.failure = error
        self.news.set()
        if self.stage.max_staleness:
            self._feed()

    def _sampling(self, place: int) -> Sampling:
        stage = self.stage
        seed = None
        if stage.max_staleness == 0:  # else what an engine draws depends on when it is updated
            words = [self.seed, place]
            seed = int(np.random.SeedSequence(words).generate_state(1)[0] >> 1)
        return Sampling(
            n=stage.grpo.samples,
            temperature=stage.rollout.temperature,
            max_tokens=stage.rollout.max_tokens,
            seed=seed,
            stop_token_ids=self.stops,
        )

    async def _group(self, place: int, prompt: Prompt, sampling: Sampling) -> Group:
        with self.generating:
            samples = await self.fleet.generate(prompt.tokens, sampling)
        self.num_tokens += sum(len(s.token_ids) for s in samples)
        texts = [self.read(s.token_ids) for s in samples]
        items = [(text, prompt.ground_truth, prompt.verifier) for text in texts]
        verdicts = await self.graders.grade(items)
        return as_group(place, prompt, samples, verdicts)

    async def _something_finishes(self) -> bool:
        """Wait a while for a group; what went wrong in the background is raised here."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.news.wait(), SAY_EVERY_S)
        if self.failure is not None:
            raise self.failure
        happened = self.news.is_set()
        self.news.clear()
        return happened

    async def score(self) -> dict[str, float]:
        """The mean reward of greedy completions of the held-out prompts, while others go on."""
        rollout = self.stage.rollout
        greedy = Sampling(temperature=0.0, max_tokens=rollout.max_tokens, stop_token_ids=self.stops)
        groups = await asyncio.gather(*(self._group(-1, p, greedy) for p in self.held_out))
        found = {"held_out": fmean(group.rewards[0] for group in groups)}
        return found | {"held_out_items": len(groups)}


class SamplerActor:
    """A sampler with its engines and graders, as the Ray actor that the learner talks to."""

    def __init__(self, step: Any, run: Any) -> None:
        self.step, self.run = step, run
        self.stage: Rlvr = step.settings["stage"]
        self.opening: asyncio.Future[None] | None = None
        self.following: asyncio.Future[None] | None = None
        self._sampler: Sampler | None = None

    @property
    def sampler(self) -> Sampler:
        if self._sampler is None:
            raise Restarted("the sampler was started again and is not open")
        return self._sampler

    async def open(self) -> int:
        """Read the prompts, start engines and graders; returns the number of optimizer steps."""
        if self.opening is None:
            self.opening = asyncio.ensure_future(self._open())
        await self.opening
        return self.sampler.order.num_steps

    async def _open(self) -> None:
        stage, step = self.stage, self.step
        folder = await asyncio.to_thread(self.run.fetch, step.inputs["model"])
        tokenizer = chat.load_tokenizer(folder)

        def load(name: str) -> list[Prompt]:
            longest = stage.seq_len - stage.rollout.max_tokens
            return load_prompts(tokenizer, name, self.run.locate(step, name), longest)

        sources = [await asyncio.to_thread(load, name) for name in stage.data]
        held_out = await asyncio.to_thread(load, stage.held_out) if stage.held_out else []
        seed, shares = step.settings["seed"], list(stage.data.values())
        place, name = step.inputs["model"].artifact.uri, f"{step.name}-{step.fingerprint}"
        self.graders = Graders(stage.rollout, self.run.recipe.sandbox, self._report)
        self.fleet = Fleet(
            stage.rollout, engine_options(step), place, f"engines-{name}", self._report
        )
        self.read = tokenizer.decode
        self._sampler = Sampler(
            stage,
            seed,
            Order(sources, shares, stage, seed),
            held_out,
            self.fleet,
            self.graders,
            chat.stop_ids(tokenizer),
            functools.partial(chat.completion_text, tokenizer),
            self._report,
        )
        self.graders.start()
        await asyncio.to_thread(self.fleet.remove_leftovers)
        self.fleet.start()
        if stage.rollout.fewest_engines < stage.rollout.num_engines:
            self.following = asyncio.ensure_future(self._follow_pool())

    async def _follow_pool(self) -> None:
        """Have as many engines as the pool says."""
        pool, name = PoolClient(), holder(self.run.run_id, self.step)
        while True:
            running = len(self.fleet.members)
            asked = ("follow", name, "engines", running)
            count = await asyncio.to_thread(pool.ask, *asked, default=running)
            self.fleet.resize(count)
            await asyncio.sleep(FOLLOW_EVERY_S)

    async def close(self) -> None:
        """End engines and graders, with their processes and placement groups."""
        if self.opening is not None and self.opening.done() and not self.opening.exception():
            if self.following is not None:
                self.following.cancel()
            self.sampler.stop()
            await asyncio.gather(self.fleet.close(), self.graders.close())

    def _report(self, event: str, message: str = "", **fields: Any) -> None:
        """What a reader of the run should know."""
        if message:
            self.run.say(self.step, message)
        else:
            self.run.event(event, self.step, **fields)

    async def ping(self) -> None:
        """A sign of life."""

    async def lost(self) -> None:
        """The learner says that the sampler before this one is gone."""
        self._report("sampler_lost")

    async def state(self) -> dict[str, Any]:
        return self.sampler.state()

    async def restore(self, state: dict[str, Any], num_batches: int) -> None:
        self.sampler.restore(state, num_batches)

    async def push(self, version: int, weights: list[Any], fresh: bool) -> float:
        return await self.sampler.push(version, weights, fresh)

    async def batch(self, step: int) -> RolloutBatch:
        batch = await self.sampler.batch(step)
        if batch.drawn:
            self._show(step, batch.drawn[0])
        if self.stage.rollout.dump_every and step % self.stage.rollout.dump_every == 0:
            await asyncio.to_thread(self._keep, step, batch.drawn)
        return batch

    async def score(self) -> dict[str, float]:
        return await self.sampler.score()

    async def logprobs(
        self, sequences: list[list[int]], starts: list[int]
    ) -> dict[str, list[list[float]]]:
        """Each engine's log-probabilities of the same sequences, for the canary."""
        return await self.sampler.fleet.from_each("logprobs", sequences, starts)

    async def digests(self) -> dict[str, dict[str, str]]:
        """What each engine was given last, by tensor."""
        return await self.sampler.fleet.from_each("checksums")

    def _show(self, step: int, group: Group) -> None:
        """The best and the worst answer to one prompt, for people who watch."""
        ordered = sorted(group.completions, key=lambda completion: -completion.reward)
        self.run.transcript(
            self.step,
            step=step,
            prompt_id=group.prompt_id,
            source=group.source,
            prompt=self.read(group.prompt)[:SHOWN_CHARACTERS],
            rewards=group.rewards,
            completions=[
                {
                    "text": self.read(each.tokens)[:SHOWN_CHARACTERS],
                    "reward": each.reward,
                    "outcome": each.outcome,
                    "tokens": len(each.tokens),
                }
                for each in ordered[:: max(1, len(ordered) - 1)]
            ],
        )

    def _keep(self, step: int, groups: list[Group]) -> None:
        """Write the rollouts of a step to the run's folder, to be read or replayed."""
        text = "".join(json.dumps(group.to_json()) + "\n" for group in groups)
        who = f"{self.step.verb}-{self.step.name}-{self.step.fingerprint}"
        place = ("runs", self.run.run_id, "rollouts", who, kept_name(step))
        storage.write_bytes(storage.join(self.step.storage_uri, *place), text.encode())


def engine_options(step: Any) -> EngineOptions:
    """How the engines of a step are built."""
    stage: Rlvr = step.settings["stage"]
    rollout = stage.rollout
    return EngineOptions(
        max_model_len=stage.seq_len + 1,
        max_num_seqs=rollout.max_num_seqs,
        dtype=stage.dtype,
        kv_cache_bytes=None if rollout.gpus_per_engine else int(rollout.kv_cache_gib * 2**30),
        gpu_share=rollout.gpus / rollout.tensor_parallel,
        tensor_parallel_size=rollout.tensor_parallel,
        seed=step.settings["seed"],
        enforce_eager=not rollout.gpus_per_engine,
        num_threads=rollout.threads,
    )


def as_group(
    place: int, prompt: Prompt, samples: Sequence[Sample], verdicts: Sequence[Verdict]
) -> Group:
    completions = [
        Completion(s.token_ids, s.logprobs, s.finish_reason, s.spans, v.score, v.outcome)
        for s, v in zip(samples, verdicts, strict=True)
    ]
    return Group(place, prompt.id, prompt.source, prompt.tokens, completions)
