"""The claims, one by one: which models each needs, and how their scores decide it.

That one thing is better than another holds, or does not, only beyond noise: the 95 % interval over
test items keeps to one side of zero, and so does every seed; else it is `within noise`. That
nothing is lost holds when the interval stays above minus `MARGIN` points.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

from bar_ray.claims import cost
from bar_ray.claims.arms import GENERAL, Arms, frozen, general_data
from bar_ray.claims.distance import moved
from bar_ray.claims.table import Estimate, Table, exactly
from bar_ray.graph import topological
from bar_ray.recipe import SHARED, Expert, Merge, Recipe
from bar_ray.report import history

HOLDS, FAILS, NOISE, UNTESTED = "holds", "does not hold", "within noise", "not testable here"
MARGIN = 5.0  # points: a loss below it is called little
PAPER = "BAR (arXiv 2604.18473)"


@dataclass(frozen=True)
class Curves:
    """Lines over a number, for a picture. Each is (x, what was measured there), by x."""

    x: str
    y: str
    lines: dict[str, list[tuple[float, Estimate]]]


@dataclass
class Finding:
    """What was measured for one claim; `curves` by the name of their picture."""

    verdict: str
    why: str
    measured: dict[str, Estimate] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """What a verdict is read from."""

    table: Table
    recipe: Recipe
    arms: Mapping[int, Arms]  # by seed

    @cached_property
    def past(self) -> history.History:
        """What was recorded while the models were made and scored; read once for all claims."""
        scores = [step for arms in self.arms.values() for step in arms.scores.values()]
        return history.read(self.recipe.storage, topological(scores), "")


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Args:
        arms: adds the models it needs.
        judge: reads the verdict off the table.
    """

    number: int
    text: str
    published: str
    arms: Callable[[Arms], None]
    judge: Callable[[Evidence], Finding]


def decide(expected: Estimate) -> str:
    """Of a difference that the claim says is above zero."""
    if expected.is_above:
        return HOLDS
    return FAILS if expected.is_below else NOISE


def not_lost(change: Estimate) -> str:
    """Of a change that the claim says is no loss."""
    if change.is_below and change.mean < -MARGIN:
        return FAILS
    return HOLDS if change.low > -MARGIN else NOISE


def worst(verdicts: Sequence[str]) -> str:
    """Of a claim with several parts: it holds when all of them do, if there are any."""
    return max(verdicts, key=[HOLDS, NOISE, FAILS].index, default=UNTESTED)


# --- 1, 6, 7: the baselines -----------------------------------------------------------------------

BASELINES = (
    *("retrain", "retrain with mid-training", "continued", "domain after domain", "dense merge"),
    *("dense merge with mid-training", "dense TIES", "dense TIES with mid-training"),
    *("BTX as published", "BTX", "LoRA adapters, SFT only"),
)


def baseline_arms(arms: Arms) -> None:
    arms.add("base", arms.base)
    arms.add("bar", arms.bar.bar)
    arms.retrain("retrain", with_midtrain=False)
    arms.retrain("retrain with mid-training", with_midtrain=True)
    arms.continued("continued")
    arms.one_by_one("domain after domain")
    merging_arms(arms)
    btx_arms(arms)
    arms.adapters("LoRA adapters, SFT only")


def baselines(found: Evidence) -> Finding:
    table = found.table
    above = {f"bar - {name}": table.difference("bar", name) for name in BASELINES}
    ceiling = table.difference("retrain with mid-training", "bar")
    measured = {name: table.score(name) for name in ("base", "bar", *BASELINES)} | above
    ahead, top = decide(above["bar - retrain"]), decide(ceiling)
    order = sorted(("bar", *BASELINES), key=lambda name: -table.score(name).mean)
    why = f"bar over retraining: {ahead}; mid-training retraining over bar: {top}. "
    return Finding(worst([ahead, top]), why + "Order: " + ", ".join(order), measured)


def merging_arms(arms: Arms) -> None:
    arms.add("bar", arms.bar.bar)
    without, after = arms.specialists(with_midtrain=False), arms.specialists(with_midtrain=True)
    for name, merge in (("merge", Merge(include_base=False)), ("TIES", Merge(rule="ties"))):
        arms.averaged(f"dense {name}", without, merge)
        arms.averaged(f"dense {name} with mid-training", after, merge)


def merging(found: Evidence) -> Finding:
    table = found.table
    without, after = (
        table.difference("bar", name) for name in ("dense merge", "dense merge with mid-training")
    )
    worse = table.difference("dense merge", "dense merge with mid-training")
    measured = {
        "bar - dense merge": without,
        "bar - dense merge with mid-training": after,
        "without - with mid-training": worse,
    }
    why = "trails without mid-training, trails with it, and is worse with it than without"
    return Finding(worst([decide(each) for each in measured.values()]), why, measured)


def btx_arms(arms: Arms) -> None:
    arms.add("bar", arms.bar.bar)
    models, base = arms.specialists(with_midtrain=True), arms.recipe.baselines
    one = Merge(rule="one", expert=base.btx_shared)
    arms.routed("BTX as published", arms.btx("btx as published", models, one))
    arms.finetuned("BTX", arms.btx("btx", models, Merge()))


def btx(found: Evidence) -> Finding:
    table = found.table
    measured = {f"bar - {n}": table.difference("bar", n) for n in ("BTX as published", "BTX")}
    verdicts = {name: decide(each) for name, each in measured.items()}
    why = "; ".join(f"{name}: {verdict}" for name, verdict in verdicts.items())
    return Finding(worst(list(verdicts.values())), why, measured)


# --- 2: new special tokens ------------------------------------------------------------------------

BOTH, FROZEN = "both learn", "all shared frozen"
OPEN = {
    FROZEN: ("embedding", "lm_head"),
    "only embeddings learn": ("lm_head",),
    "only the LM head learns": ("embedding",),
}


def token_domains(recipe: Recipe) -> list[str]:
    """Domains whose recipe opens embeddings and LM head in SFT, as new tokens need."""
    known = {name: expert.sft for name, expert in recipe.experts.items() if expert.sft}
    return [n for n, sft in known.items() if sft.learn.embedding and sft.learn.lm_head]


def token_arms(arms: Arms) -> None:
    for domain in token_domains(arms.recipe):
        expert = arms.recipe.experts[domain]
        arms.add(f"{domain}, {BOTH}", arms.bar.experts[domain])
        learn = expert.sft.learn
        tables = {name: frozen(learn, *roles) for name, roles in OPEN.items()}
        for name, table in tables.items():
            sft = replace(expert.sft, learn=table)
            arms.expert(f"{domain}, {name}", domain, replace(expert, sft=sft))
        for name in (BOTH, FROZEN):
            for steps in arms.recipe.reproduce.token_steps:
                sft = replace(expert.sft, learn=tables.get(name, learn), steps=steps)
                changed = replace(expert, sft=sft)
                arms.expert(f"{domain}, {name}, {steps} steps", domain, changed)


def tokens(found: Evidence) -> Finding:
    table, recipe = found.table, found.recipe
    measured: dict[str, Estimate] = {}
    curves: dict[str, Curves] = {}
    losses = []
    for domain in token_domains(recipe):
        for name in (BOTH, *OPEN):
            measured[f"{domain}, {name}"] = table.score(f"{domain}, {name}", domain)
        pair = f"{domain}, {BOTH}", f"{domain}, {FROZEN}"
        losses.append(table.difference(*pair, domain))
        measured[f"{domain}, both - frozen"] = losses[-1]
        if recipe.reproduce.token_steps:
            curves[f"tokens-{domain}"] = token_curves(table, recipe, domain)
    if not losses:
        return Finding(UNTESTED, "no domain of the recipe opens embeddings and LM head")
    why = "with both frozen the domain is lost; the rows say which of the two is needed"
    return Finding(worst([decide(each) for each in losses]), why, measured, curves)


def token_curves(table: Table, recipe: Recipe, domain: str) -> Curves:
    lines = {}
    for name in (BOTH, FROZEN):
        models = {n: f"{domain}, {name}, {n} steps" for n in recipe.reproduce.token_steps}
        models[recipe.experts[domain].sft.steps] = f"{domain}, {name}"
        lines[name] = [(float(n), table.score(models[n], domain)) for n in sorted(models)]
    return Curves(f"SFT steps on {domain}", f"{domain}, percent right", lines)


# --- 3: RLVR with frozen weights ------------------------------------------------------------------

RLVR = {
    "all shared frozen": SHARED,
    "attention frozen": ("attention",),
    "nothing frozen but the anchor": (),
}
ANCHOR_TOO = "the anchor learns too"


def rl_domains(recipe: Recipe) -> list[str]:
    return [name for name, expert in recipe.experts.items() if expert.rlvr]


def varied(recipe: Recipe) -> list[str]:
    wanted = recipe.reproduce.reinforced
    return [name for name in rl_domains(recipe) if name in wanted or not wanted]


def rlvr_arms(arms: Arms) -> None:
    for domain in varied(arms.recipe):
        expert = arms.recipe.experts[domain]
        learn = expert.rlvr.learn
        arms.add(f"{domain} sft", arms.bar.experts[domain].inputs["model"])
        tables = {name: frozen(learn, *roles) for name, roles in RLVR.items()}
        tables[ANCHOR_TOO] = replace(learn, anchor=learn.expert)
        for name, table in tables.items():
            changed = replace(expert, rlvr=replace(expert.rlvr, learn=table))
            arms.expert(f"{domain} rlvr, {name}", domain, changed)


def rlvr(found: Evidence) -> Finding:
    table, recipe = found.table, found.recipe
    measured: dict[str, Estimate] = {}
    verdicts = []
    frozen_name, *_, open_name = RLVR
    for domain in varied(recipe):
        for name in (*RLVR, ANCHOR_TOO):
            gain = table.difference(f"{domain} rlvr, {name}", f"{domain} sft", domain)
            measured[f"{domain}, {name}: gain over SFT"] = gain
        pair = f"{domain} rlvr, {open_name}", f"{domain} rlvr, {frozen_name}"
        more = table.difference(*pair, domain)
        measured[f"{domain}: {open_name} - {frozen_name}"] = more
        gained = measured[f"{domain}, {frozen_name}: gain over SFT"]
        verdicts.append(FAILS if gained.is_above else decide(more))
    why = (
        f"a gain beyond noise with {frozen_name} refutes it; without one, learning all must gain "
        "more beyond noise"
    )
    curves = {f"rewards-{domain}": rewards(found, domain) for domain in varied(recipe)}
    return Finding(worst(verdicts), why, measured, curves)


def rewards(found: Evidence, domain: str) -> Curves:
    """Mean reward of the rollouts of every RLVR step, as recorded."""
    steps = {
        name: [arms.models[f"{domain} rlvr, {name}"] for arms in found.arms.values()]
        for name in (*RLVR, ANCHOR_TOO)
    }
    recorded = found.past.metrics
    lines = {}
    for name, of_seeds in steps.items():
        by_step: dict[float, list[float]] = {}
        for row in chain(*(recorded.get(history.identity(step), ()) for step in of_seeds)):
            by_step.setdefault(row["step"], []).append(100 * row["reward"])
        lines[name] = [(at, exactly(each, "percent")) for at, each in sorted(by_step.items())]
    return Curves("RLVR step", f"mean reward of {domain} rollouts, percent", lines)


# --- 4: mixed SFT ---------------------------------------------------------------------------------


def mixed(recipe: Recipe, domain: str, share: float) -> Expert:
    """The expert up to SFT, with another share of general data."""
    expert, common = recipe.experts[domain], general_data(recipe)
    own = {name: rows for name, rows in expert.sft.data.items() if name != common}
    data = {name: (1 - share) * rows / sum(own.values()) for name, rows in own.items()}
    kept = {name: rows for name, rows in {**data, common: share}.items() if rows}
    return replace(expert, sft=replace(expert.sft, data=kept), rlvr=None)


def mixing_domains(recipe: Recipe) -> list[str]:
    return recipe.reproduce.mixed or [n for n, e in recipe.experts.items() if e.sft]


def own_share(recipe: Recipe, domain: str) -> float:
    data = recipe.experts[domain].sft.data
    return data[general_data(recipe)] / sum(data.values())


def shares(recipe: Recipe, domain: str) -> list[float]:
    return sorted({0.0, *recipe.reproduce.shares, own_share(recipe, domain)})


def mixing_arms(arms: Arms) -> None:
    arms.add("base", arms.base)
    for domain in mixing_domains(arms.recipe):
        for share in shares(arms.recipe, domain):
            if share == own_share(arms.recipe, domain):
                arms.add(f"{domain}, {share:.0%} general", arms.bar.stages[domain]["sft"])
            else:
                changed = mixed(arms.recipe, domain, share)
                arms.expert(f"{domain}, {share:.0%} general", domain, changed)


def mixing(found: Evidence, category: str = GENERAL) -> Finding:
    table, recipe = found.table, found.recipe
    measured: dict[str, Estimate] = {}
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    verdicts = []
    for domain in mixing_domains(recipe):
        for share in shares(recipe, domain):
            name = f"{domain}, {share:.0%} general"
            for each in (category, domain):
                measured[f"{name}: {each}"] = score = table.score(name, each)
                lines.setdefault(f"{domain} expert: {each}", []).append((100 * share, score))
        alone, both = (f"{domain}, {s:.0%} general" for s in (0, own_share(recipe, domain)))
        lost = table.difference(both, alone, category)
        measured[f"{domain}, mixed - alone: {category}"] = lost
        verdicts.append(decide(lost))
    why = f"{category} ability of a domain-only SFT against the recipe's mixture"
    curves = {"mixing": Curves("general data in SFT, percent of rows", "percent right", lines)}
    return Finding(worst(verdicts), why, measured, curves)


# --- 5: averaging ---------------------------------------------------------------------------------


def merges(recipe: Recipe) -> dict[str, Merge]:
    """The rules that are compared; the recipe's own is `bar`."""
    found = {
        "mean without the base": Merge(include_base=False),
        "sum of deltas": Merge(rule="sum"),
        "TIES": Merge(rule="ties"),
        "Fisher": Merge(rule="fisher"),
    }
    kept = recipe.reproduce.kept or recipe.experts
    one = {f"shared of {name}": Merge(rule="one", expert=name) for name in kept}
    return {**found, **one}


def faster(expert: Expert) -> Expert:
    """The same expert with its shared weights at the full learning rate."""

    def opened(stage: Any) -> Any:
        if stage is None:
            return None
        rates = {role: 1.0 for role in SHARED if getattr(stage.learn, role)}
        return replace(stage, learn=replace(stage.learn, **rates))

    return replace(expert, sft=opened(expert.sft), rlvr=opened(expert.rlvr))


FULL_RATE = "shared weights at the full rate"


def averaging_arms(arms: Arms) -> None:
    arms.add("bar", arms.bar.bar)
    for name, merge in merges(arms.recipe).items():
        arms.with_merge(name, merge)
    moved = {name: faster(expert) for name, expert in arms.recipe.experts.items()}
    built = arms.variant(FULL_RATE, experts=moved)
    for domain in arms.recipe.experts:
        arms.add(f"{domain} expert", arms.bar.experts[domain])
        arms.add(f"{domain} expert, {FULL_RATE}", built.experts[domain])


def averaging(found: Evidence) -> Finding:
    table, recipe = found.table, found.recipe
    measured: dict[str, Estimate] = {}
    costs = []
    for domain in recipe.experts:
        costs.append(table.difference("bar", f"{domain} expert", domain))
        measured[f"{domain}: bar - its expert"] = costs[-1]
        pair = FULL_RATE, f"{domain} expert, {FULL_RATE}"
        measured[f"{domain}: the same, {FULL_RATE}"] = table.difference(*pair, domain)
        for name in (f"{domain} expert", f"{domain} expert, {FULL_RATE}"):
            far = [moved(arms.bar.branch, arms.models[name]) for arms in found.arms.values()]
            measured[f"{name}: shared weights moved by"] = exactly(far, "% of their norm")
    for name in merges(recipe):
        measured[f"{name} - bar"] = table.difference(name, "bar")
    why = f"no domain falls more than {MARGIN:g} points below its own expert"
    return Finding(worst([not_lost(each) for each in costs]), why, measured)


# --- 8: the router's data -------------------------------------------------------------------------


def router_arms(arms: Arms) -> None:
    recipe = arms.recipe
    router, settings = recipe.router, recipe.reproduce
    arms.add("bar", arms.bar.bar)
    arms.add("router, 0 steps", arms.bar.merged)
    for fraction in settings.fractions:
        arms.with_router(f"router, {fraction:.0%} of the data", fraction=fraction)
    for steps in settings.router_steps:
        arms.with_router(f"router, {steps} steps", steps=steps)
    for times in LONGER:
        more = {"data": every_source(recipe), "fraction": 1.0, "steps": router.steps * times}
        arms.with_router(f"router, all SFT sources, {times}x the steps", **more)
    if settings.rare:
        sources, _ = arms.router_data()
        data = {settings.rare.get(name, name): share for name, share in sources.items()}
        few = {"data": data, "fraction": min(settings.fractions), "natural": True}
        for name, stratified in (("stratified", True), ("at random", False)):
            arms.with_router(f"router, rare source {name}", stratified=stratified, **few)


LONGER = (1, 3)


def every_source(recipe: Recipe) -> dict[str, float]:
    """The router's sources and those of the experts that it leaves out."""
    own = {name for e in recipe.experts.values() if e.sft for name in e.sft.data}
    return {**dict.fromkeys(sorted(own), 1.0), **recipe.router.data}


def routing(found: Evidence) -> Finding:
    table, recipe = found.table, found.recipe
    names = [name for name in table.models if name.startswith("router, ")]
    measured = {f"{name} - bar": table.difference(name, "bar") for name in names}
    most = f"router, {max(recipe.reproduce.fractions):.0%} of the data"
    # More data at equal steps must not be better by more than the margin.
    enough = not_lost(table.difference("bar", most))
    undone = []
    for domain in rl_domains(recipe):
        for times in LONGER:
            name = f"router, all SFT sources, {times}x the steps"
            fell = table.difference("bar", name, domain)
            measured[f"bar - {name}: {domain}"] = fell
        undone.append(decide(fell))
    why = (
        f"all of the sources' data at equal steps is at most {MARGIN:g} points better: {enough}; "
        f"all SFT data for {LONGER[-1]} times the steps takes RLVR's gain away: {worst(undone)}"
    )
    return Finding(worst([enough, *undone]), why, measured, router_curves(found))


def router_curves(found: Evidence) -> dict[str, Curves]:
    table, recipe = found.table, found.recipe
    samples = {each: f"router, {each:.0%} of the data" for each in recipe.reproduce.fractions}
    samples[recipe.router.fraction] = "bar"
    fractions = [(100 * each, table.score(samples[each])) for each in sorted(samples)]
    models = {n: f"router, {n} steps" for n in (0, *recipe.reproduce.router_steps)}
    if recipe.router.steps:  # 0 stands for `epochs`: no place on this axis
        models[recipe.router.steps] = "bar"
    steps = [(float(n), table.score(models[n])) for n in sorted(models)]
    y = "overall, percent right"
    return {
        "router-data": Curves("percent of the router's SFT sources", y, {"bar": fractions}),
        "router-steps": Curves("steps of router training", y, {"bar": steps}),
    }


# --- 9: active experts ----------------------------------------------------------------------------


def active(recipe: Recipe) -> list[int]:
    return list(range(len(recipe.experts), 1, -1))


def active_arms(arms: Arms) -> None:
    arms.add("bar", arms.bar.bar)
    for count in active(arms.recipe):
        arms.with_router(f"{count} experts active", top_k=count)


def active_experts(found: Evidence) -> Finding:
    table, recipe = found.table, found.recipe
    names = [f"{count} experts active" for count in active(recipe)]
    measured = {f"{name} - bar": table.difference(name, "bar") for name in names}
    fewest = table.difference("bar", names[-1])
    models = {count: f"{count} experts active" for count in active(recipe)}
    models[recipe.router.top_k or len(recipe.experts) + 1] = "bar"  # the anchor is one of them
    scores = [(float(count), table.score(models[count])) for count in sorted(models)]
    curves = {"active": Curves("active experts", "overall, percent right", {"bar": scores})}
    why = (
        "fewer active experts cost score: bar against the fewest; one is refused, as its router "
        "gets no gradient in post-norm blocks"
    )
    return Finding(decide(fewest), why, measured, curves)


# --- 10: upgrades ---------------------------------------------------------------------------------


def upgrade_arms(arms: Arms) -> None:
    recipe = arms.recipe
    arms.add("bar", arms.bar.bar)
    for domain, expert in recipe.reproduce.older.items():
        arms.with_expert(f"before better data: {domain}", domain, expert)
    for domain in rl_domains(recipe):
        without = replace(recipe.experts[domain], rlvr=None)
        arms.with_expert(f"before RLVR: {domain}", domain, without)
    last = list(recipe.experts)[-1]
    arms.with_expert(f"before adding: {last}", last, None)


def upgrades(found: Evidence) -> Finding:
    table = found.table
    measured: dict[str, Estimate] = {}
    verdicts = []
    for name in [n for n in table.models if n.startswith("before ")]:
        domain = name.rpartition(": ")[2]
        gain = table.difference("bar", name, domain)
        measured[f"{name}, gain: {domain}"] = gain
        verdicts.append(decide(gain))
        for other in (c for c in table.categories if c != domain):
            moved = table.difference("bar", name, other)
            measured[f"{name}, gain: {other}"] = moved
            verdicts.append(not_lost(moved))
    why = f"the domain gains beyond noise, and no other loses more than {MARGIN:g} points"
    return Finding(worst(verdicts), why, measured)


# --- 12: late RL ----------------------------------------------------------------------------------


def late_arms(arms: Arms) -> None:
    arms.add("bar", arms.bar.bar)
    arms.retrain("retrain", with_midtrain=False)
    experts = {name: replace(e, rlvr=None) for name, e in arms.recipe.experts.items()}
    arms.variant("bar without RLVR", experts=experts)


def late(found: Evidence) -> Finding:
    table, recipe = found.table, found.recipe
    measured: dict[str, Estimate] = {}
    verdicts = []
    for category in (c for c in table.categories if c not in rl_domains(recipe)):
        lost = table.difference("retrain sft", "retrain", category)
        kept = table.difference("bar", "bar without RLVR", category)
        measured[f"{category}: retraining, lost by RLVR"] = lost
        measured[f"{category}: bar, gained by RLVR"] = kept
        verdicts.append((lost, kept))
    why = f"retraining loses a category by RLVR beyond noise, BAR none by {MARGIN:g} points or more"
    degrades = HOLDS if any(lost.is_above for lost, _ in verdicts) else NOISE
    return Finding(worst([degrades, *(not_lost(kept) for _, kept in verdicts)]), why, measured)


# --- 11: cost -------------------------------------------------------------------------------------


def costs(found: Evidence) -> Finding:
    measured = cost.measure(found.recipe, found.arms, found.past)
    num_domains = len(found.recipe.experts)
    verdicts = []
    for unit in cost.NAMES.values():
        ours, theirs = (
            measured[f"{kind}, {unit}, {num_domains} updates"] for kind in ("BAR", "retraining")
        )
        verdicts.append(HOLDS if ours.high < theirs.low else FAILS)
    why = (
        "cumulative cost of all updates, BAR below retraining in tokens, FLOPs and seconds; "
        "retraining is modelled from one measured retraining on all domains"
    )
    unit, counts = cost.NAMES["flops"], range(1, num_domains + 1)
    lines = {
        kind: [(float(n), measured[f"{kind}, {unit}, {n} updates"]) for n in counts]
        for kind in ("BAR", "retraining")
    }
    x, y = "domains updated, one after the other", f"training, {unit} in all"
    return Finding(worst(verdicts), why, measured, {"cost": Curves(x, y, lines)})


CLAIMS = (
    Claim(
        1,
        "BAR exceeds post-training-only retraining; retraining with mid-training is the ceiling.",
        "overall 49.1; retraining 47.8, with mid-training 50.5; continued 45.3; BTX 46.7; "
        "dense merging 36.9, with mid-training 6.5",
        baseline_arms,
        baselines,
    ),
    Claim(
        2,
        "SFT with frozen embeddings and LM head fails where a domain brings new special tokens.",
        "tool use 20.3 frozen, 46.4 with both learning",
        token_arms,
        tokens,
    ),
    Claim(
        3,
        "RLVR with all shared weights frozen stays flat.",
        "math reward flat for 250 steps when frozen, 2.2 to 3.4 when not; a later run with "
        "attention frozen went from 41.9 to 57.9",
        rlvr_arms,
        rlvr,
    ),
    Claim(
        4,
        "Domain-only SFT destroys general ability; mixed SFT keeps it.",
        "chat 15.7 after math only, 40.9 mixed",
        mixing_arms,
        mixing,
    ),
    Claim(
        5,
        "Averaging the shared weights that diverged costs little.",
        "tool use 46.6 in the expert, 45.5 merged",
        averaging_arms,
        averaging,
    ),
    Claim(
        6,
        "Dense merging fails after mid-training, and trails without it.",
        "overall 6.5 with mid-training, 36.9 without, BAR 49.1",
        merging_arms,
        merging,
    ),
    Claim(7, "BTX trails BAR.", "overall 46.7 against 49.1", btx_arms, btx),
    Claim(
        8,
        "A stratified sample of 5 % suffices for the router; more data undoes RLVR.",
        "1 %: 44.4, 5 %: 48.8, 100 %: 47.6; math 56.2 at 5 %, 43.8 at 100 %",
        router_arms,
        routing,
    ),
    Claim(
        9,
        "Fewer active experts cost score.",
        "k = 5, 4, 3, 2, 1: 48.8, 48.2, 36.8, 38.8, 31.1 (tokens were dropped below k = E)",
        active_arms,
        active_experts,
    ),
    Claim(
        10,
        "One expert can be upgraded, added or removed; the others stay where they are.",
        "code +16.5 by better data, math +13.0 by RLVR, others within 2 points",
        upgrade_arms,
        upgrades,
    ),
    Claim(
        11,
        "Updating domain by domain costs linearly under BAR, quadratically under retraining.",
        "asymptotic, without measured hours",
        cost.arms,
        costs,
    ),
    Claim(
        12,
        "Late RLVR degrades earlier abilities of a monolithic model, and not of BAR.",
        "stated in the paper without figures",
        late_arms,
        late,
    ),
)
