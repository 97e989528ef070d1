"""Engines that are lost, silent, replaced, and given wrong weights: real vLLM, real signals."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.actor import ActorHandle
from safetensors.numpy import load_file

from bar_ray.recipe import Rlvr, Rollout, Sandbox
from bar_ray.rollout.engine import EngineOptions, Sampling
from bar_ray.rollout.fleet import Fleet, FleetError
from bar_ray.rollout.graders import Graders
from bar_ray.rollout.sampler import SamplerActor
from bar_ray.rollout.source import LiveRollouts
from bar_ray.rollout.sync import Canary, CanaryError, WeightSync
from bar_ray.rollout.weights import Tensors

pytestmark = pytest.mark.slow

OPTIONS = EngineOptions(max_model_len=128, max_num_seqs=16, kv_cache_bytes=32 << 20)
TOLERANCE = 1e-3
DEADLINE_S = 180.0


class Host:
    """A fleet and graders in an actor, as the sampler has them."""

    def __init__(self, rollout: Rollout, folder: str) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.fleet = Fleet(rollout, OPTIONS, folder, "test", self._report)
        self.graders = Graders(rollout, Sandbox(), self._report)

    def _report(self, event: str, message: str = "", **fields: Any) -> None:
        self.events.append((event, fields))

    async def start(self) -> None:
        self.fleet.start()
        self.graders.start()

    async def generate(self, prompts: list[list[int]], max_tokens: int) -> list[Any]:
        import asyncio

        sampling = Sampling(max_tokens=max_tokens, n=2)
        return await asyncio.gather(*(self.fleet.generate(p, sampling) for p in prompts))

    async def push(self, version: int, weights: list[Any], fresh: bool = False) -> float:
        started = time.monotonic()
        await self.fleet.push(version, weights, fresh)
        return time.monotonic() - started

    async def each(self, method: str, *arguments: Any) -> dict[str, Any]:
        return await self.fleet.from_each(method, *arguments)

    async def processes(self) -> list[int]:
        """Of the engines that serve, waiting until there are as many as asked for."""
        ready = [m for m in self.fleet.members if m.ready]
        return [m.process[1] for m in ready]

    async def started(self) -> int:
        """How many engines have answered at all."""
        return sum(member.process is not None for member in self.fleet.members)

    async def resize(self, num: int) -> None:
        self.fleet.resize(num)

    async def grade(self, items: list[tuple[str, Any, str]]) -> list[Any]:
        return await self.graders.grade(items)

    async def grader_process(self) -> int:
        [actor] = self.graders.busy
        return await actor.__ray_call__.remote(lambda _: os.getpid())

    async def reported(self) -> list[tuple[str, dict[str, Any]]]:
        return self.events

    async def close(self) -> None:
        await self.fleet.close()
        await self.graders.close()


class Owner:
    """Holds weights as a learner does: they go with it."""

    def put(self, weights: Tensors) -> list[Any]:
        return [ray.put(weights)]


@pytest.fixture(scope="module")
def folder(larger_moe: Path) -> Path:
    return larger_moe


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # for the class above
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=here)
    yield
    ray.shutdown()


@pytest.fixture
def host(cluster: None, folder: Path, request: pytest.FixtureRequest) -> Iterator[ActorHandle]:
    """A started fleet with the settings of the test's `fleet` mark; nothing is left of it."""
    settings = {"silence_s": 60.0, **request.node.get_closest_marker("fleet").kwargs}
    actor = ray.remote(Host).options(num_cpus=0).remote(Rollout(**settings), str(folder))
    call(actor.start.remote())
    yield actor
    pids = call(actor.processes.remote())
    call(actor.close.remote())
    ray.kill(actor)
    assert all_gone(pids)
    assert not living_groups()


def all_gone(pids: list[int]) -> bool:
    """Whether the processes end within some seconds."""
    deadline = time.monotonic() + 20
    while (left := any(map(psutil.pid_exists, pids))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left


def call(ref: Any) -> Any:
    return ray.get(ref, timeout=DEADLINE_S)


def living_groups() -> list[str]:
    records = ray.util.placement_group_table().values()
    return [r["name"] for r in records if r["state"] != "REMOVED"]


def wait_for_engines(host: ActorHandle, num: int, without: int = 0) -> list[int]:
    """Processes of the engines that serve, once they are `num` and none is `without`."""
    deadline = time.monotonic() + DEADLINE_S
    while len(pids := call(host.processes.remote())) != num or without in pids:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return pids


def prompts(num: int) -> list[list[int]]:
    return [[3 + n, 5, 7] for n in range(num)]


@pytest.mark.fleet(num_engines=2)
def test_prompts_of_a_killed_engine_go_to_another_and_it_is_replaced(host: ActorHandle) -> None:
    victim, _ = wait_for_engines(host, 2)
    running = host.generate.remote(4 * prompts(24), 100)
    time.sleep(1.0)
    assert not ray.wait([running], timeout=0)[0], "all was sampled before the kill"
    os.kill(victim, signal.SIGKILL)
    groups = call(running)
    assert [len(samples) for samples in groups] == [2] * 96
    wait_for_engines(host, 2, without=victim)
    events = [name for name, _ in call(host.reported.remote())]
    assert events.count("engine_lost") == 1 and events.count("engine_ready") == 3


@pytest.mark.fleet(num_engines=1, silence_s=8.0)
def test_a_frozen_engine_is_noticed_killed_and_replaced_with_current_weights(
    host: ActorHandle, folder: Path
) -> None:
    [victim] = wait_for_engines(host, 1)
    head = {"lm_head.weight": load_file(folder / "model.safetensors")["lm_head.weight"] * 2}
    call(host.push.remote(7, [ray.put(head)]))
    os.kill(victim, signal.SIGSTOP)
    groups = call(host.generate.remote(prompts(2), 8))
    assert {span[0] for samples in groups for s in samples for span in s.spans} == {7}
    lost = [fields for name, fields in call(host.reported.remote()) if name == "engine_lost"]
    assert "engine 0 (health) has not answered since" in lost[0]["reason"]
    assert all_gone([victim]), "a stopped process is killed all the same"


@pytest.mark.fleet(num_engines=1)
def test_engines_are_added_and_removed_while_others_serve(host: ActorHandle, folder: Path) -> None:
    """The learner dies meanwhile, and what it had pushed with it: the next one's weights count."""
    head = {"lm_head.weight": load_file(folder / "model.safetensors")["lm_head.weight"]}
    learner = ray.remote(Owner).remote()
    wait_for_engines(host, 1)
    call(host.push.remote(1, call(learner.put.remote(head))))
    ray.kill(learner)
    call(host.resize.remote(2))
    assert len(call(host.generate.remote(prompts(4), 8))) == 4
    deadline = time.monotonic() + DEADLINE_S
    while call(host.started.remote()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1.0)
    assert len(call(host.processes.remote())) == 1, "it must not serve without the weights"
    call(host.push.remote(2, [ray.put(head)]))
    wait_for_engines(host, 2)
    groups = call(host.generate.remote(prompts(8), 8))
    assert {span[0] for samples in groups for s in samples for span in s.spans} == {2}
    call(host.resize.remote(1))
    assert len(call(host.generate.remote(prompts(4), 8))) == 4
    wait_for_engines(host, 1)
    assert "engine_lost" not in [name for name, _ in call(host.reported.remote())]


@pytest.mark.fleet(num_engines=1, max_failures=0)
def test_too_many_losses_end_the_stage(host: ActorHandle) -> None:
    [victim] = wait_for_engines(host, 1)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(FleetError, match="1 engines were lost"):
        call(host.generate.remote(prompts(1), 8))


@pytest.mark.fleet(num_engines=1)
def test_a_grader_that_dies_is_replaced_and_its_work_done_again(host: ActorHandle) -> None:
    items = [("#### 4", "4", "math"), ("#### 5", "4", "math")]
    assert [v.score for v in call(host.grade.remote(items))] == [1.0, 0.0]
    os.kill(call(host.grader_process.remote()), signal.SIGKILL)
    assert [v.score for v in call(host.grade.remote(items))] == [1.0, 0.0]
    assert "grader_lost" in [name for name, _ in call(host.reported.remote())]


# --- wrong weights -------------------------------------------------------------------------------


class Rollouts:
    """The engines of a host as `WeightSync` sees them; `spoil` changes what is sent."""

    def __init__(self, host: ActorHandle) -> None:
        self.host, self.spoil, self.pushes = host, lambda tensors: tensors, 0

    def push(self, version: int, weights: list[Any], fresh: bool = False) -> float:
        self.pushes += 1
        sent = self.spoil(dict(call(weights[0])))
        return call(self.host.push.remote(version, [ray.put(sent)], fresh))

    def logprobs(self, sequences: list[list[int]], starts: list[int]) -> dict[str, Any]:
        return call(self.host.each.remote("logprobs", sequences, starts))

    def digests(self) -> dict[str, dict[str, str]]:
        return call(self.host.each.remote("checksums"))


class Learned:
    """A learner's weights, one step further than the folder's."""

    def __init__(self, folder: Path) -> None:
        from transformers import FlexOlmoForCausalLM

        self.before = load_file(folder / "model.safetensors")
        self.model = FlexOlmoForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rng = np.random.default_rng(1)
        moved = ("lm_head.weight", "model.layers.0.self_attn.o_proj.weight")
        self.tensors = {
            name: self.before[name] + 0.1 * rng.standard_normal(self.before[name].shape, np.float32)
            for name in moved
        }
        with torch.no_grad():
            for name, value in self.tensors.items():
                self.model.get_parameter(name).copy_(torch.from_numpy(value))

    def everything(self) -> Tensors:
        return {**self.before, **self.tensors}

    def logprobs(self, canaries: list[Canary]) -> list[list[float]]:
        with torch.no_grad():
            return [
                [
                    float(row[token])
                    for row, token in zip(
                        self.model(torch.tensor([c.tokens]))
                        .logits[0]
                        .log_softmax(-1)[c.start - 1 : -1],
                        c.tokens[c.start :],
                        strict=True,
                    )
                ]
                for c in canaries
            ]


@pytest.fixture
def sync(host: ActorHandle, folder: Path) -> WeightSync:
    learned, events = Learned(folder), []
    canaries = [Canary([3, 9, 14, 15, 26, 5, 35], 3), Canary([8, 9, 7, 9, 3, 23], 2)]
    made = WeightSync(
        Rollouts(host),
        lambda: learned.tensors,
        learned.everything,
        learned.logprobs,
        TOLERANCE,
        lambda event, **fields: events.append((event, fields)),
        canaries,
    )
    made.events = events
    return made


@pytest.mark.fleet(num_engines=1)
def test_a_wrong_push_is_caught_in_the_same_step_and_repaired(
    sync: WeightSync, folder: Path
) -> None:
    """One tensor left out, one stale: both are named, and one full push mends them."""
    before = load_file(folder / "model.safetensors")

    def left_out(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: t for n, t in tensors.items() if n != "lm_head.weight"}

    def stale(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**tensors, "lm_head.weight": before["lm_head.weight"]}

    for version, fault in enumerate((left_out, stale), start=1):
        sync.events.clear()
        sync.rollouts.spoil = once(sync.rollouts, fault)
        assert sync.synchronise(version)["canary_gap"] < TOLERANCE
        (_, seen), (repaired, _) = sync.events
        assert seen["tensors"] == ["lm_head.weight"] and seen["gap"] > TOLERANCE
        assert repaired == "weights_repaired"
        back = {"lm_head.weight": before["lm_head.weight"]}  # as it was, for the next fault
        call(sync.rollouts.host.push.remote(0, [ray.put(back)]))

    sync.canaries = []  # without the canary the same fault goes unnoticed
    sync.rollouts.spoil = left_out
    sync.events.clear()
    sync.synchronise(3)
    assert not sync.events


def once(rollouts: Rollouts, fault: Any) -> Any:
    def spoil(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rollouts.spoil = lambda sent: sent
        return fault(tensors)

    return spoil


@pytest.mark.fleet(num_engines=1)
def test_a_push_that_cannot_be_repaired_stops_the_run(sync: WeightSync, folder: Path) -> None:
    def left_out(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: t for n, t in tensors.items() if n != "lm_head.weight"}

    def not_numbers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: tensor * np.float32("nan") for name, tensor in tensors.items()}

    for version, (fault, named) in enumerate(
        ((left_out, r"\['lm_head.weight'\]"), (not_numbers, r".*lm_head")), start=1
    ):
        sync.rollouts.spoil, sync.rollouts.pushes = fault, 0
        with pytest.raises(CanaryError, match=f"Tensors that differ: {named}"):
            sync.synchronise(version)
        assert sync.rollouts.pushes == 2


class Line:
    """Of a sampler, only where the line of prompts stands."""

    def __init__(self) -> None:
        self.order = SimpleNamespace(num_steps=9)
        self.at: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        return self.at

    def restore(self, state: dict[str, Any], num_batches: int) -> None:
        self.at = {**state, "batches": num_batches}


class BareSampler(SamplerActor):
    """The sampler's actor without engines; what it reports goes to a file."""

    async def _open(self) -> None:
        self._sampler = Line()

    def _report(self, event: str, message: str = "", **fields: Any) -> None:
        with open(self.run, "a") as file:
            file.write(f"{event}\n")


def test_calls_that_wait_for_a_lost_sampler_find_it_where_the_line_stood(
    cluster: None, tmp_path: Path
) -> None:
    """Ray keeps them for the one it starts again, which knows nothing of the line."""
    stage = Rlvr()
    step = SimpleNamespace(settings={"stage": stage})
    options = {"num_cpus": 0, "max_restarts": 9}
    actor = ray.remote(BareSampler).options(**options).remote(step, str(tmp_path / "events"))
    rollouts = LiveRollouts(actor, stage)
    assert rollouts.open() == 9
    rollouts.start({"cursor": 5}, 3)
    for number in range(1, 4):
        ray.kill(actor, no_restart=False)
        if number > 1:  # not only calls that are under way when it dies
            time.sleep(number - 1)
        deadline = time.monotonic() + 60
        while rollouts.num_lost < number:  # it may still answer for a moment
            assert rollouts.state() == {"cursor": 5, "batches": 3}
            assert time.monotonic() < deadline
        assert rollouts.num_lost == number
    ray.get(actor.ping.remote())
    assert (tmp_path / "events").read_text().split() == ["sampler_lost"] * 3
    ray.kill(actor)
