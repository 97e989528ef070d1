"""The claims of the paper: equal budgets, shared artifacts, statistics, verdicts."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bar_ray import config, pipeline, storage
from bar_ray.claims import claims, report
from bar_ray.claims.arms import Arms
from bar_ray.claims.claims import CLAIMS, FAILS, HOLDS, NOISE, UNTESTED, Evidence, decide, worst
from bar_ray.claims.distance import moved
from bar_ray.claims.joint import joint
from bar_ray.claims.table import Table
from bar_ray.graph import Step, plan, topological
from bar_ray.recipe import SHARED, Merge, Recipe, Sft
from bar_ray.report.history import identity
from bar_ray.types import UserError

CATEGORIES = ("general", "math", "code", "tool_use", "safety")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return config.load("conf/reproduce.yaml")


@pytest.fixture
def arms(recipe: Recipe) -> Arms:
    return Arms(recipe)


def made_by(step: Step) -> set[str]:
    return {each.artifact.uri for each in topological([step])}


# --- budgets --------------------------------------------------------------------------------------


def test_joint_training_takes_the_rows_of_each_expert() -> None:
    one = Sft(data={"general": 0.5, "math": 0.5}, steps=400, batch_size=4, seq_len=256)
    two = Sft(data={"general": 1.0, "code": 3.0}, steps=100, batch_size=8, seq_len=256)
    both = joint([one, two])
    assert both.data == {"general": 1000.0, "math": 800.0, "code": 600.0}
    assert both.steps * both.batch_size == 400 * 4 + 100 * 8
    with pytest.raises(UserError, match="one length"):
        joint([one, replace(two, seq_len=128)])
    with pytest.raises(UserError, match="not `epochs`"):
        joint([one, replace(two, steps=0)])


def test_retraining_spends_what_the_experts_spend(recipe: Recipe, arms: Arms) -> None:
    def rows(step: Step, kind: str) -> int:
        steps = {s.artifact.uri: s for s in topological([step]) if s.verb == kind}.values()
        return sum(s.settings["stage"].steps * s.settings["stage"].batch_size for s in steps)

    model = arms.retrain("retrain", with_midtrain=True)
    experts = [*arms.bar.experts.values()]
    spent = {verb: sum(rows(e, verb) for e in experts) for verb in ("midtrain", "sft", "rlvr")}
    chain = [s for s in topological([model]) if s.name.startswith("retrain")]
    stages = {s.name: s.settings["stage"] for s in chain}
    others = recipe.tiny.post_train, recipe.router
    assert stages["retrain"].steps * stages["retrain"].batch_size == spent["rlvr"]
    midtrain, sft = stages["retrain-midtrain"], stages["retrain-sft"]
    assert midtrain.steps * midtrain.batch_size == spent["midtrain"]
    extra = sum(stage.steps * stage.batch_size for stage in others)
    assert sft.steps * sft.batch_size == spent["sft"] + extra


# --- sharing --------------------------------------------------------------------------------------


def test_arms_reuse_what_the_recipe_makes_anyway(recipe: Recipe, arms: Arms) -> None:
    own = {s.artifact.uri for s in topological(pipeline.build(recipe).targets)}
    fewer = arms.with_router("k", top_k=2)
    assert {s.verb for s in topological([fewer]) if s.artifact.uri not in own} == {"route"}
    merged = arms.with_merge("sum", Merge(rule="sum"))
    added = {s.verb for s in topological([merged]) if s.artifact.uri not in own}
    assert added == {"merge", "route"}
    arms.add("bar", arms.bar.bar)
    assert arms.scores["bar"].artifact.uri in own, "scored once, for the recipe and for the claims"


def test_steps_of_an_arm_say_so_and_shared_ones_do_not(arms: Arms) -> None:
    few = arms.with_router("router, few", fraction=0.01)
    labels = [each.step.label for each in plan([arms.bar.bar, few])]
    assert len(set(labels)) == len(labels)
    assert {"route bar", "route bar (router, few)", "sft math"} <= set(labels)


def test_steps_of_several_seeds_say_which(recipe: Recipe) -> None:
    each = [Arms(replace(recipe, seed=seed), f"seed {seed}") for seed in (0, 1)]
    targets = [step for arms in each for step in (arms.bar.bar, arms.with_router("few", steps=1))]
    labels = [one.step.label for one in plan(targets)]
    assert len(set(labels)) == len(labels)
    assert {"sft math (seed 1)", "route bar (seed 0: few)"} <= set(labels)


def test_a_model_with_two_names_is_scored_once(arms: Arms) -> None:
    arms.add("one", arms.base)
    arms.add("two", arms.base)
    assert arms.scores["one"] is arms.scores["two"]


def test_frozen_arms_differ_in_their_freeze_table_alone(recipe: Recipe, arms: Arms) -> None:
    claims.token_arms(arms)
    each = arms.models.values()
    tables = {name: step.settings["stage"].learn for name, step in arms.models.items()}
    assert not (tables["tool_use, all shared frozen"].embedding)
    assert not (tables["tool_use, all shared frozen"].lm_head)
    assert tables["tool_use, only embeddings learn"].embedding == 0.1
    assert tables["tool_use, only embeddings learn"].lm_head == 0
    stages = [replace(s.settings["stage"], learn=recipe.tiny.post_train.learn) for s in each]
    full, short = recipe.experts["tool_use"].sft.steps, *recipe.reproduce.token_steps
    assert {stage.steps for stage in stages} == {full, short}
    assert all(replace(stage, steps=full) == stages[0] for stage in stages)


# --- statistics -----------------------------------------------------------------------------------


def table_of(rates: dict[str, dict[str, float]], seeds: int = 3, items: int = 120) -> Table:
    """A table of models that answer each category's items right with a given probability."""
    draw = random.Random(0)

    def answers(rate: float) -> dict[str, float]:
        return {f"item-{i}": float(draw.random() < rate) for i in range(items)}

    return Table(
        {
            seed: {
                model: {c: answers(by_category.get(c, 0.5)) for c in CATEGORIES}
                for model, by_category in rates.items()
            }
            for seed in range(seeds)
        }
    )


def test_differences_are_paired_by_item() -> None:
    base = {f"i{n}": float(n % 2) for n in range(100)}
    better = {**base, "i0": 1.0, "i2": 1.0}
    table = Table({0: {"a": {"math": better}, "b": {"math": base}}})
    found = table.difference("a", "b", "math")
    assert found.mean == pytest.approx(2.0) and found.by_seed == (pytest.approx(2.0),)
    # Two of 100 items differ, by one each: standard error sqrt(0.0196 / 99 * 100 / 100) of a point.
    assert found.high - found.mean == pytest.approx(1.96 * 100 * (0.02 * 0.98 / 99) ** 0.5)
    score = table.score("b", "math")
    assert score.mean == pytest.approx(50) and score.high - score.low > 15


def test_overall_is_the_mean_of_the_categories() -> None:
    table = table_of({"a": dict.fromkeys(CATEGORIES, 0.9), "b": {}})
    means = [table.difference("a", "b", c).mean for c in CATEGORIES]
    whole = table.difference("a", "b")
    assert whole.mean == pytest.approx(sum(means) / len(means))
    widths = [
        (table.difference("a", "b", c).high - m) for c, m in zip(CATEGORIES, means, strict=True)
    ]
    assert whole.high - whole.mean == pytest.approx(sum(w**2 for w in widths) ** 0.5 / 5)


def test_a_verdict_needs_every_seed_and_the_interval() -> None:
    up = table_of({"a": dict.fromkeys(CATEGORIES, 0.9), "b": {}})
    assert decide(up.difference("a", "b")) == HOLDS
    assert decide(up.difference("b", "a")) == FAILS
    level = table_of({"a": {}, "b": {}})
    assert decide(level.difference("a", "b")) == NOISE

    def answers(rate: float) -> dict[str, dict[str, float]]:
        return {"math": {f"i{n}": float(n < 100 * rate) for n in range(100)}}

    split = [{"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0}, {"a": 0.4, "b": 0.5}]
    items = {seed: {m: answers(r) for m, r in by.items()} for seed, by in enumerate(split)}
    found = Table(items).difference("a", "b")
    assert found.low > 0 and not found.is_above, "one seed says otherwise"
    assert worst([HOLDS, NOISE, FAILS]) == FAILS and worst([HOLDS, NOISE]) == NOISE


# --- verdicts and the page ------------------------------------------------------------------------


@pytest.fixture
def unmoved(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no checkpoints to measure here."""
    monkeypatch.setattr(claims, "moved", lambda *_: 1.5)


def test_every_claim_has_a_verdict_and_a_place_on_the_page(tmp_path: Path, unmoved: None) -> None:
    settings = [f"storage={tmp_path}", "reproduce.notes={4: Mixing is cheap.}"]
    recipe = config.load("conf/reproduce.yaml", settings)
    chosen = report.chosen(recipe)
    arms = report.arms_of(recipe, chosen)
    table = table_of({name: {} for name in arms.scores})
    record_rewards(arms, {"math rlvr, all shared frozen": [0.2, 0.4]})
    record_run(tmp_path, "1", [(arms.bar.bar, "started", 10), (arms.bar.bar, "finished", 100)])
    record_run(tmp_path, "2", [(arms.bar.bar, "reused", 200), (arms.base, "finished", 240)])
    record_run(tmp_path, "3", [(arms.bar.bar, "reused", 300), (arms.base, "reused", 900)])
    found = report.judge(Evidence(table, recipe, {0: arms}), chosen)
    assert [claim["number"] for claim in found["claims"]] == [claim.number for claim in CLAIMS]
    folder = report.write(recipe, found, "python jobs/reproduce.py")
    report.copy(folder, str(tmp_path / "docs"))
    page = (tmp_path / "docs" / "claims.md").read_text()
    written = json.loads((tmp_path / "report" / "claims.json").read_text())
    pictures = [picture.name for picture in (tmp_path / "docs" / "claims").iterdir()]
    assert all(f"claims/{name}" in page for name in pictures) and len(pictures) > 8
    for claim in written["claims"]:
        assert claim["verdict"] in (HOLDS, FAILS, NOISE) and claim["measured"], claim["claim"]
        assert f"## {claim['number']}. {claim['claim']}" in page
    rewards = written["claims"][2]["curves"]["rewards-math"]["lines"]
    assert [(at, each["mean"]) for at, each in rewards["all shared frozen"]] == [(1, 20), (2, 40)]
    tokens = written["claims"][1]["curves"]["tokens-tool_use"]["lines"]
    assert [at for at, _ in tokens["both learn"]] == [100, 450]
    assert tokens.keys() == {"both learn", "all shared frozen"}
    assert "**: general ability" in page and "\n\nMixing is cheap.\n\n" in page
    assert written["runs"] == {"count": 2, "seconds": 90 + 40}, "the third made nothing"
    assert "seeds 0, 1, 2; 2m10s in 2 runs." in page
    active = written["claims"][8]["curves"]["active"]["lines"]["bar"]
    assert [at for at, _ in active] == [2, 3, 4, 5], "the anchor is one of them"


def record_run(storage_uri: Path, run_id: str, events: list[tuple[Step, str, float]]) -> None:
    rows = []
    for step, event, time in events:
        verb, name, fingerprint = identity(step)
        who = {"verb": verb, "name": name, "fingerprint": fingerprint}
        rows.append({"event": event, "time": time, **who})
    place = storage_uri / "runs" / run_id / "events.jsonl"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))


def record_rewards(arms: Arms, rewards: dict[str, list[float]]) -> None:
    """What a run would have written down about RLVR stages."""
    rows = []
    for name, curve in rewards.items():
        verb, stage, fingerprint = identity(arms.models[name])
        who = {"verb": verb, "name": stage, "fingerprint": fingerprint, "time": 0.0}
        rows += [{**who, "step": n, "reward": reward} for n, reward in enumerate(curve, 1)]
    place = Path(arms.recipe.storage, "runs", "1", "metrics.jsonl")
    place.parent.mkdir(parents=True)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_distance_of_shared_weights(small_moe: Path, tmp_path: Path) -> None:
    """Experts are no part of it, and it is relative."""
    from bar_ray.model import tensors
    from bar_ray.model.tensors import Checkpoint

    one = Checkpoint(small_moe)

    def scaled(name: str) -> Any:
        role = tensors.role_of(name)
        return one[name] * (1.1 if role in SHARED else 3.0)

    places = []
    for name, tensor in (("one", one.__getitem__), ("other", scaled)):
        step = Step("sft", name, {}, storage_uri=str(tmp_path))
        made = tmp_path / f"{name}-made"
        made.mkdir()
        tensors.write(made, one.config, {n: one.spec(n) for n in one.names}, tensor)
        storage.commit(str(made), step.artifact.uri, {})
        places.append(step)
    assert moved(*places) == pytest.approx(10, rel=1e-5)


def test_verdicts_follow_the_scores(recipe: Recipe) -> None:
    """Each claim holds in a world as published, and fails in the opposite one."""
    good, bad = dict.fromkeys(CATEGORIES, 0.9), dict.fromkeys(CATEGORIES, 0.1)
    names = {"bar": good, "dense merge": {}, "dense merge with mid-training": bad}
    assert claims.merging(Evidence(table_of(names), recipe, {})).verdict == HOLDS
    names |= {"dense merge": good, "bar": {}}
    assert claims.merging(Evidence(table_of(names), recipe, {})).verdict == FAILS
    btx = {"bar": good, "BTX": {}, "BTX as published": {}}
    assert claims.btx(Evidence(table_of(btx), recipe, {})).verdict == HOLDS
    assert (
        claims.btx(Evidence(table_of(btx | {"BTX": good, "bar": {}}), recipe, {})).verdict == FAILS
    )


def test_a_recipe_without_rlvr_leaves_some_claims_untested(unmoved: None) -> None:
    without = [f"experts.{n}.rlvr=null" for n in ("math", "code")]
    recipe = config.load("conf/reproduce.yaml", without)
    chosen = report.chosen(recipe)
    arms = report.arms_of(recipe, chosen)
    table = table_of({name: {} for name in arms.scores})
    found = report.judge(Evidence(table, recipe, {0: arms}), chosen)
    verdicts = {claim["number"]: claim["verdict"] for claim in found["claims"]}
    assert verdicts[3] == UNTESTED


def test_a_category_for_each_expert_is_needed(recipe: Recipe) -> None:
    categories = {n: uri for n, uri in recipe.evaluate.categories.items() if n != "code"}
    wrong = replace(recipe, evaluate=replace(recipe.evaluate, categories=categories))
    with pytest.raises(UserError, match="code is missing"):
        report.arms_of(wrong, CLAIMS)


@pytest.mark.parametrize("setting", ["claims=[99]", "notes={99: no such claim}"])
def test_an_unknown_claim_is_refused(setting: str) -> None:
    wrong = config.load("conf/reproduce.yaml", [f"reproduce.{setting}"])
    with pytest.raises(UserError, match=f"{setting.partition('=')[0]}: no claim 99"):
        report.chosen(wrong)
