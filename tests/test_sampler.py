"""The sampler against an engine that answers as told: order, staleness, refill, resuming.

The same sampler with real engines stands in test_fleet.py and test_end_to_end.py.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bar_ray.recipe import Grpo, Rlvr
from bar_ray.rollout.engine import Sample, Sampling
from bar_ray.rollout.records import Group, Prompt, RolloutBatch
from bar_ray.rollout.sampler import Line, Order, Sampler
from bar_ray.types import Verdict


class FakeFleet:
    """Two samples a prompt, spanning the versions between which they were drawn."""

    num_lost = 0

    def __init__(self, wait: Callable[[int], Awaitable[None]]) -> None:
        self.version, self.wait = 0, wait
        self.calls: list[tuple[int, Sampling]] = []

    async def push(self, version: int, weights: Any, fresh: bool) -> None:
        self.version = version

    async def generate(self, tokens: list[int], sampling: Sampling) -> list[Sample]:
        began = self.version
        self.calls.append((tokens[0], sampling))
        await self.wait(tokens[0])
        spans = [(began, 0, 1)] if began == self.version else [(began, 0, 1), (self.version, 1, 2)]
        return [Sample([tokens[0], n], [-1.0, -1.0], "stop", spans) for n in range(sampling.n)]


class FakeGraders:
    """The second sample is right, except for prompts in `flat`: both are."""

    num_lost = 0

    def __init__(self, flat: set[int]) -> None:
        self.flat = flat

    async def grade(self, items: list[tuple[str, Any, str]]) -> list[Verdict]:
        row = int(items[0][0].split()[0])
        return [Verdict(float(row in self.flat or i == 1), "right") for i in range(len(items))]


def sampler(
    stage: Rlvr,
    wait: Callable[[int], Awaitable[None]] | None = None,
    flat: set[int] | None = None,
    num_prompts: int = 8,
) -> Sampler:
    prompts = [Prompt(f"p{n}", "src", [n], "", "math") for n in range(num_prompts)]

    async def at_once(row: int) -> None:
        await asyncio.sleep(0)

    def read(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    return Sampler(
        stage,
        0,
        Order([prompts], [1.0], stage, 0),
        prompts[:2],
        FakeFleet(wait or at_once),
        FakeGraders(flat or set()),
        (0,),
        read,
        lambda *_, **__: None,
    )


def stage(**settings: Any) -> Rlvr:
    return Rlvr(**{"steps": 0, "epochs": 2.0, "batch_size": 4, "grpo": Grpo(samples=2), **settings})


async def learn(sampler: Sampler, first: int = 0, last: int = 10**6) -> list[RolloutBatch]:
    """A fake learner: takes every batch and pushes the next version."""
    batches = []
    await sampler.push(first, [], False)
    for step in range(first, last):
        batch = await sampler.batch(step)
        if not batch.consumed:
            break
        batches.append(batch)
        await sampler.push(step + 1, [], False)
        await asyncio.sleep(0)
    return batches


def ids(batches: list[RolloutBatch]) -> list[str]:
    return [each.prompt_id for batch in batches for each in batch.consumed]


def test_line_gives_returned_places_first() -> None:
    line = Line(4)
    assert [line.take(), line.take(), line.take()] == [0, 1, 2]
    line.give_back(2)
    line.give_back(0)
    assert [line.take(), line.take(), line.take(), line.take()] == [0, 2, 3, None]


def test_synchronous_batches_take_prompts_in_order_from_the_newest_weights() -> None:
    made = sampler(stage())
    batches = asyncio.run(learn(made))
    assert [[c.place for c in b.consumed] for b in batches] == [
        list(range(n, n + 4)) for n in range(0, 16, 4)
    ]
    assert all(group.oldest == b.step for b in batches for group in b.groups)
    assert Counter(ids(batches)) == {f"p{n}": 2 for n in range(8)}, "two epochs"
    assert len({sampling.seed for _, sampling in made.fleet.calls}) == 16


@pytest.mark.parametrize("refill", [0.0, 0.5])
def test_groups_without_signal_are_consumed_and_made_up_for(refill: float) -> None:
    made = sampler(stage(refill=refill), flat={1, 4})
    batches = asyncio.run(learn(made))
    assert Counter(ids(batches)) == {f"p{n}": 2 for n in range(8)}
    assert all(c.learned == (c.prompt_id not in ("p1", "p4")) for b in batches for c in b.consumed)
    sizes = [len(batch.groups) for batch in batches]
    assert sum(sizes) == 12
    assert sizes == [4, 4, 4] if refill else max(sizes) <= 4


def test_a_world_without_signal_ends_too() -> None:
    made = sampler(stage(refill=1.0), flat=set(range(8)))
    batches = asyncio.run(learn(made))
    assert [len(batch.consumed) for batch in batches] == [8, 8]
    assert not any(batch.groups for batch in batches)


@pytest.mark.parametrize("bound", [1, 2, 4])
def test_nothing_older_than_the_bound_is_learned_from(bound: int) -> None:
    rng = random.Random(bound)

    async def uneven(row: int) -> None:
        for _ in range(rng.choice((1, 1, 2, 40))):
            await asyncio.sleep(0)

    made = sampler(stage(max_staleness=bound, epochs=20.0), uneven)
    batches = asyncio.run(learn(made))
    assert all(0 <= b.step - group.oldest <= bound for b in batches for group in b.groups)
    assert Counter(ids(batches)) == {f"p{n}": 20 for n in range(8)}, "dropped ones came back"
    assert any(b.step - group.oldest for b in batches for group in b.groups), "engines ran ahead"
    places = [c.place for b in batches for c in b.consumed]
    assert sorted(places) == list(range(160))


def test_engines_run_ahead_by_the_bound_and_no_further() -> None:
    async def scenario() -> None:
        made = sampler(stage(max_staleness=2, epochs=20.0))
        await made.push(0, [], False)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(made.finished) == 3 * 4, "this batch and two more"

    asyncio.run(scenario())


def test_a_completion_slower_than_the_bound_is_waited_for_the_second_time() -> None:
    """Otherwise it would be dropped for ever."""
    slow = asyncio.Event()

    async def wait(row: int) -> None:
        if row == 3:
            await asyncio.wait_for(slow.wait(), 5)
        await asyncio.sleep(0)

    async def scenario() -> tuple[Sampler, list[RolloutBatch]]:
        made = sampler(stage(max_staleness=1, epochs=3.0), wait)
        batches = []
        await made.push(0, [], False)
        for step in range(10):
            asking = asyncio.ensure_future(made.batch(step))
            for _ in range(30):
                await asyncio.sleep(0)
            if not asking.done():  # the learner waits for the straggler
                slow.set()
            batch = await asking
            if not batch.consumed:
                break
            batches.append(batch)
            await made.push(step + 1, [], False)
            if step == 2:  # two steps late: dropped
                slow.set()
                await asyncio.sleep(0.01)
                slow.clear()
        return made, batches

    made, batches = asyncio.run(scenario())
    assert made.num_dropped >= 1
    assert Counter(ids(batches)) == {f"p{n}": 3 for n in range(8)}


@pytest.mark.parametrize("bound", [0, 2])
def test_a_restored_line_repeats_and_leaves_out_nothing(bound: int) -> None:
    """Kill the learner, the sampler, or both, after some batches; go on from the state."""
    settings = stage(max_staleness=bound, epochs=6.0, refill=0.5)
    rng = random.Random(0)

    async def uneven(row: int) -> None:
        for _ in range(rng.choice((1, 5, 9))):
            await asyncio.sleep(0)

    async def scenario(keeps_pending: bool, same_sampler: bool) -> list[RolloutBatch]:
        made = sampler(settings, uneven, flat={2})
        batches = await learn(made, 0, 4)
        state = made.state()
        if not keeps_pending:  # what the learner knows of a sampler that died
            state = batches[-1].line
        await made.batch(4)  # asked for, and lost with the learner
        if not same_sampler:
            made.stop()
            made = sampler(settings, uneven, flat={2})
        made.restore(state, 4)
        return batches + await learn(made, 4)

    for keeps_pending in (True, False):
        for same_sampler in (True, False):
            batches = asyncio.run(scenario(keeps_pending, same_sampler))
            assert Counter(ids(batches)) == {f"p{n}": 6 for n in range(8)}
            assert sorted(c.place for b in batches for c in b.consumed) == list(range(48))
            assert all(b.step - g.oldest <= bound for b in batches for g in b.groups)


def test_pending_groups_survive_as_they_are() -> None:
    async def scenario() -> tuple[list[Group], list[Group]]:
        first = sampler(stage(max_staleness=2, epochs=9.0))
        await first.push(0, [], False)
        for _ in range(50):
            await asyncio.sleep(0)
        second = sampler(stage(max_staleness=2, epochs=9.0))
        second.restore(first.state(), 0)
        return list(first.finished.values()), list(second.finished.values())

    before, after = asyncio.run(scenario())
    assert before == after and len(before) == 12


def test_what_fails_in_the_background_reaches_the_learner() -> None:
    async def broken(row: int) -> None:
        raise RuntimeError("the engines are gone")

    with pytest.raises(RuntimeError, match="the engines are gone"):
        asyncio.run(learn(sampler(stage(), broken)))


def test_engines_that_never_follow_are_an_error_and_no_endless_loop() -> None:
    made = sampler(stage(max_staleness=1, epochs=9.0))

    async def forgotten(version: int, weights: Any, fresh: bool) -> None: ...

    made.fleet.push = forgotten
    with pytest.raises(RuntimeError, match="the engines do not follow the learner"):
        asyncio.run(learn(made))


def test_batches_say_what_they_are_made_of() -> None:
    made = sampler(stage(max_staleness=1), flat={0})
    batches = asyncio.run(learn(made))
    numbers = batches[1].metrics
    assert numbers["reward"] == numbers["reward/src"] >= 0.5
    assert numbers["outcome/right"] == 1.0 and numbers["staleness_max"] <= 1
    assert asyncio.run(made.score()) == {"held_out": 0.5, "held_out_items": 2}
