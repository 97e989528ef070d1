"""The pool: fair shares of whole processes, and steps that are let in, grow and shrink."""

import random
from collections.abc import Sequence

import pytest

from bar_ray.cluster.pool import PATIENCE_S, Pool, Standing
from bar_ray.cluster.quota import Counts, Demand, Group, Resources, Room, fits, missing, targets

GPU = {"GPU": 1.0}
NODE = {"GPU": 4.0, "CPU": 8.0}


def expert(name: str, low: int, high: int, **share: float) -> Demand:
    return Demand(f"run/{name}", name, {"workers": Group(GPU, low, high)}, **share)


def workers(counts: Counts) -> dict[str, int]:
    return {name.removeprefix("run/"): groups["workers"] for name, groups in counts.items()}


# --- who should have how many --------------------------------------------------------------------


def shares(nodes: Sequence[Resources], *running: Demand) -> dict[str, int]:
    return workers(targets(nodes, running, []).counts)


def test_equal_experts_share_equally() -> None:
    assert shares([NODE], expert("a", 1, 8)) == {"a": 4}
    assert shares([NODE], expert("a", 1, 8), expert("b", 1, 8)) == {"a": 2, "b": 2}
    three = [expert(name, 1, 8) for name in "abc"]
    assert shares([NODE], *three) == {"a": 2, "b": 1, "c": 1}, "the first in line gets what is over"


def test_weights_priorities_and_limits() -> None:
    assert shares([NODE], expert("a", 1, 8, weight=3), expert("b", 1, 8)) == {"a": 3, "b": 1}
    assert shares([NODE], expert("a", 1, 3, priority=1), expert("b", 1, 8)) == {"a": 3, "b": 1}
    assert shares([NODE], expert("a", 1, 8, priority=1), expert("b", 2, 8)) == {"a": 2, "b": 2}
    assert shares([NODE], expert("a", 1, 1), expert("b", 1, 8)) == {"a": 1, "b": 3}


def test_processes_are_not_cut_in_two() -> None:
    """Two nodes with three GPUs each have no room for three processes of two."""
    large = Demand("run/a", "a", {"workers": Group({"GPU": 2.0}, 1, 9)})
    assert shares([{"GPU": 3.0}, {"GPU": 3.0}], large) == {"a": 2}
    small = expert("b", 1, 9)
    assert shares([{"GPU": 3.0}, {"GPU": 3.0}], large, small) == {"a": 2, "b": 2}


def test_nobody_overtakes_one_that_waits() -> None:
    large, small = expert("large", 4, 4), expert("small", 1, 1)
    found = targets([NODE], [expert("a", 1, 4)], [large, small])
    assert not found.admitted
    assert workers(found.counts) == {"a": 4}, "what waits in vain holds nobody back"
    found = targets([NODE], [expert("a", 1, 4)], [expert("fits", 3, 3), small])
    assert [demand.label for demand in found.admitted] == ["fits"]
    assert workers(found.counts) == {"a": 1, "fits": 3}


def test_engines_and_learners_are_let_in_together() -> None:
    rlvr = Demand("run/r", "r", {"engines": Group(GPU, 2, 4), "workers": Group(GPU, 1, 2)})
    assert not targets([{"GPU": 2.0}], [], [rlvr]).admitted
    assert targets([{"GPU": 5.0}], [], [rlvr]).counts["run/r"] == {"engines": 4, "workers": 1}


@pytest.mark.parametrize("seed", range(50))
def test_shares_are_feasible_complete_and_fair(seed: int) -> None:
    """Of any pool: nothing beyond a node, no room left that somebody wants, nobody far behind."""
    draw = random.Random(seed)
    nodes = [{"GPU": float(draw.choice((1, 2, 4, 8)))} for _ in range(draw.randint(1, 5))]
    total = int(sum(node["GPU"] for node in nodes))
    demands = [
        expert(str(n), 1, draw.randint(1, 12), weight=draw.choice((1.0, 1.0, 2.0)))
        for n in range(draw.randint(1, total))
    ]
    found = shares(nodes, *demands)
    assert sum(found.values()) == min(total, sum(d.groups["workers"].high for d in demands))
    for demand in demands:
        group, mine = demand.groups["workers"], found[demand.label]
        assert group.low <= mine <= group.high
        for other in demands:  # giving one up would leave the other behind me
            if found[other.label] > 1 and mine < group.high:
                theirs = (found[other.label] - 1) / other.weight
                assert theirs <= mine / demand.weight + 1e-9


def test_what_a_cluster_lacks_is_said() -> None:
    assert missing([NODE], expert("a", 4, 8)) == ""
    assert missing([NODE], expert("a", 6, 8)) == "6 GPU of 4"
    assert missing([{"CPU": 2.0}], expert("a", 1, 1)) == "1 GPU of 0"
    large = Demand("run/a", "a", {"workers": Group({"GPU": 3.0}, 2, 2)})
    found = missing([NODE, {"GPU": 2.0}], large)
    assert found == "2 x {'GPU': 3.0} do not fit on its 2 nodes"


def test_rooms_pack_the_fullest_node_first() -> None:
    room = Room([{"GPU": 4.0}, {"GPU": 2.0}])
    assert room.put({"GPU": 1.0}) and room.free == [{"GPU": 4.0}, {"GPU": 1.0}]
    assert not room.put({"GPU": 5.0}) and not room.put({"TPU": 1.0})
    assert fits({"GPU": 0.1}, {"GPU": 0.1 + 0.2 - 0.2})


# --- the pool over time --------------------------------------------------------------------------


class Story:
    """A pool of four GPUs, a clock to turn, and drivers that declare."""

    def __init__(self, *nodes: Resources, resize_s: float = 10.0) -> None:
        self.nodes, self.now, self.resize_s = list(nodes or [NODE]), 0.0, resize_s
        self.asked: tuple[list[Resources], list[Resources]] = ([], [])
        self.pool = Pool(lambda: self.nodes, self._request, lambda: self.now)

    def _request(self, held: list[Resources], beyond: list[Resources]) -> None:
        self.asked = held, beyond

    def declare(
        self, running: Sequence[Demand], waiting: Sequence[Demand] = (), run: str = "run"
    ) -> dict[str, Standing]:
        return self.pool.declare(run, list(running), list(waiting), self.resize_s)

    def start(self, demand: Demand) -> int | None:
        """Let in alone; the number of workers it starts with."""
        assert self.declare([], [demand])[demand.holder].may_run
        return self.pool.take(demand.holder, "workers")

    def train(self, demand: Demand, count: int, left_s: float = 1000.0, idle: float = 0.0) -> int:
        """The run asks, saves if it must, and its controller follows."""
        if self.pool.wants_change(demand.holder, "workers", left_s, idle):
            self.pool.saved(demand.holder, "workers")
        return self.pool.follow(demand.holder, "workers", count)


def test_an_expert_shrinks_for_another_and_grows_when_it_has_gone() -> None:
    story, a, b = Story(), expert("a", 1, 4), expert("b", 1, 4)
    assert story.start(a) == 4
    assert not story.declare([a], [b])[b.holder].may_run, "its place is still taken"
    story.now = 1.0
    assert story.train(a, 4) == 2
    assert not story.declare([a], [b])[b.holder].may_run, "the run is still shrinking"
    assert story.train(a, 2) == 2
    assert story.declare([a], [b])[b.holder].may_run
    assert story.pool.take(b.holder, "workers") == 2
    story.declare([a, b])
    assert (story.train(a, 2), story.train(b, 2)) == (2, 2)
    story.declare([b])
    assert story.train(b, 2) == 2, "not so soon after its start"
    story.now = 12.0
    assert story.train(b, 2) == 4


def test_a_change_waits_for_a_checkpoint() -> None:
    story, a, b = Story(), expert("a", 1, 4), expert("b", 1, 4)
    story.start(a)
    story.declare([a], [b])
    assert story.pool.follow(a.holder, "workers", 4) == 4
    assert story.pool.wants_change(a.holder, "workers", 1000.0, 0.0)
    story.now = PATIENCE_S
    assert story.pool.follow(a.holder, "workers", 4) == 4
    story.pool.saved(a.holder, "workers")
    assert not story.pool.wants_change(a.holder, "workers", 1000.0, 0.0), "once is enough"
    assert story.pool.follow(a.holder, "workers", 4) == 2


def test_a_run_that_never_saves_is_not_waited_for_for_ever() -> None:
    story, a, b = Story(), expert("a", 1, 4), expert("b", 1, 4)
    story.start(a)
    story.declare([a], [b])
    assert story.pool.follow(a.holder, "workers", 4) == 4
    story.now = PATIENCE_S + 1
    assert story.pool.follow(a.holder, "workers", 4) == 2


def test_a_change_must_be_worth_its_start() -> None:
    story, a = Story({"GPU": 2.0}), expert("a", 1, 4)
    assert story.start(a) == 2
    story.now = 30.0  # the start has taken so long
    assert story.train(a, 2, left_s=500.0) == 2
    story.nodes.append({"GPU": 2.0})
    assert story.train(a, 2, left_s=50.0) == 2, "25 s gained, 30 s lost"
    assert story.train(a, 2, left_s=70.0) == 4
    story.now = 60.0
    assert story.train(a, 4, left_s=100.0) == 4
    story.declare([a], [expert("b", 1, 4)])
    assert story.train(a, 4, left_s=20.0) == 4, "it ends before it could start anew"
    assert story.train(a, 4, left_s=90.0) == 2


def test_lost_nodes_shrink_a_run_and_new_ones_let_it_grow() -> None:
    story, a = Story({"GPU": 2.0}, {"GPU": 2.0}), expert("a", 1, 4)
    assert story.start(a) == 4
    story.nodes = [{"GPU": 2.0}]
    assert story.pool.take(a.holder, "workers") == 2, "started anew after the loss"
    story.nodes, story.now = [{"GPU": 2.0}] * 2, 20.0
    assert story.train(a, 2) == 4


def test_learners_that_wait_for_rollouts_make_room() -> None:
    story = Story({"GPU": 6.0})
    rlvr = Demand("run/r", "r", {"engines": Group(GPU, 1, 2), "workers": Group(GPU, 1, 4)})
    sft = expert("s", 1, 4)
    story.declare([], [rlvr])
    assert story.pool.follow(rlvr.holder, "engines", 1) == 2
    assert story.pool.take(rlvr.holder, "workers") == 4
    story.declare([rlvr])
    assert story.train(rlvr, 4, idle=0.1) == 4
    assert story.train(rlvr, 4, idle=0.8) == 1
    assert story.train(rlvr, 1, idle=0.2) == 1
    story.declare([rlvr], [sft])
    assert story.pool.take(sft.holder, "workers") == 3


def test_drivers_share_and_one_that_is_silent_is_forgotten() -> None:
    story, a = Story(), expert("a", 2, 4)
    mine, other = Demand("x/c", "c", dict(a.groups)), Demand("x/d", "d", dict(a.groups))
    story.start(a)
    story.declare([], [mine, other], run="x")
    assert story.train(a, 4) == 2 and story.train(a, 2) == 2
    answer = story.declare([], [mine, other], run="x")
    assert answer[mine.holder].may_run and not answer[other.holder].may_run
    story.now = 61.0
    assert story.declare([mine], [other], run="x")[other.holder].may_run
    story.pool.leave("x")
    assert story.pool.view()["free"] == {"CPU": 8.0, "GPU": 4.0}


def test_a_new_pool_takes_over_what_is_declared() -> None:
    story, a, b = Story(), expert("a", 1, 4), expert("b", 1, 4)
    assert story.declare([a])[a.holder].may_run
    assert story.train(a, 4) == 4, "as many as it had"
    assert not story.declare([a], [b])[b.holder].may_run
    assert story.train(a, 4) == 2
    assert story.pool.take("run/unknown", "workers") is None
    assert story.pool.follow("run/unknown", "workers", 3) == 3


def test_the_autoscaler_hears_what_is_wanted() -> None:
    story = Story({"CPU": 4.0})
    rlvr = Demand("run/r", "r", {"engines": Group(GPU, 1, 2), "workers": Group(GPU, 1, 3)})
    assert story.declare([], [rlvr])[rlvr.holder].may_run, "alone, to make the cluster grow"
    assert story.asked == ([GPU], [GPU] * 3)
    light = Demand("run/l", "l", {"step": Group({"CPU": 1.0}, 1, 1)})
    story.declare([rlvr], [expert("waits", 2, 5), light])
    assert story.asked == ([GPU], [GPU] * 3 + [GPU] * 5)
    story.pool.leave("run")
    assert story.asked == ([], [])


def test_the_view_says_who_holds_and_who_waits() -> None:
    story, a, b = Story(), expert("a", 1, 3), expert("b", 4, 4)
    story.start(a)
    story.declare([a], [b])
    view = story.pool.view()
    assert view["total"] == {"CPU": 8.0, "GPU": 4.0} and view["free"] == {"CPU": 8.0, "GPU": 1.0}
    first, second = view["steps"]
    assert (first["step"], first["state"], first["groups"]["workers"]["held"]) == (
        *("a", "running"),
        3,
    )
    assert (second["step"], second["state"]) == ("b", "waiting")
