"""What is published, and models made of published experts."""

from collections.abc import Mapping
from dataclasses import replace

from bar_ray import registry, storage, validate
from bar_ray.builder import Builder
from bar_ray.graph import Published, Step, topological
from bar_ray.pipeline import Pipeline
from bar_ray.recipe import STAGES, Baselines, Expert, Recipe, Reproduce, Sweep
from bar_ray.registry import Version
from bar_ray.types import UserError


def publish(graph: Pipeline, recipe: Recipe, scores: dict) -> None:
    """Enter each finished expert and the model in the registry, with lineage and scores."""
    models = scores["models"]
    numbers = {
        domain: publish_expert(recipe, domain, expert, models.get(f"{domain} {expert.verb}", {}))
        for domain, expert in graph.experts.items()
    }
    publish_model(recipe, graph.bar, numbers, models.get("bar", {}))


def publish_expert(recipe: Recipe, domain: str, expert: Step, scores: dict[str, float]) -> int:
    return registry.publish(recipe.storage, domain, version_of(expert, scores)).version


def publish_model(
    recipe: Recipe, bar: Step, experts: Mapping[str, int], scores: Mapping[str, float]
) -> int:
    version = replace(version_of(bar, scores), experts=dict(experts))
    return registry.publish(recipe.storage, registry.MODEL, version, registry.MODELS).version


def version_of(step: Step, scores: Mapping[str, float]) -> Version:
    place = "/".join(("artifacts", step.verb, step.name, step.fingerprint))
    return Version(place, step.fingerprint, tuple(map(line_of, topological([step]))), scores)


def line_of(step: Step) -> str:
    """A step in a lineage."""
    return f"{step.verb} {step.name} {step.fingerprint}"


def _own_stages(recipe: Recipe, domain: str, version: Version) -> dict[str, Step]:
    """What a published expert went through."""
    steps = [_recorded(recipe, line) for line in version.lineage]
    return {s.verb: s for s in steps if s.verb in STAGES and s.name == domain}


def _recorded(recipe: Recipe, line: str) -> Published:
    verb, name, fingerprint = line.split()
    return Published(verb, name, {}, storage_uri=recipe.storage, known=fingerprint)


def published(recipe: Recipe, version: Version) -> Published:
    """A version from the registry, as a step to go on from."""
    _, verb, name, fingerprint = version.artifact.split("/")
    step = _recorded(recipe, f"{verb} {name} {fingerprint}")
    if storage.read_manifest(step.artifact.uri) is None:
        raise UserError(f"{step.artifact.uri} is published, but no longer there")
    return step


def with_experts(recipe: Recipe, experts: Mapping[str, Expert]) -> Recipe:
    """The recipe with other experts, and a router that learns from their data.

    Sources that belonged to experts no longer there go; an expert none of whose sources is left
    brings all of them. Without `router.data` the sources are those of the experts anyway.
    """
    router = recipe.router
    if router.data:
        before, after = _sources(recipe.experts), _sources(experts)
        gone = set().union(*before.values()) - set().union(*after.values())
        data = {name: share for name, share in router.data.items() if name not in gone}
        common = set.intersection(*after.values()) if len(after) > 1 else set()
        for sources in after.values():
            if not (sources - common) & data.keys():
                data |= dict.fromkeys(sorted(sources - common), 1.0)
        router = replace(router, data=data)
    changed = replace(recipe, experts=dict(experts), router=router)
    check_model(changed)
    return changed


def check_model(recipe: Recipe) -> None:
    """Refuse a recipe made of another one when its model cannot be."""
    validate.check(replace(recipe, reproduce=Reproduce(), baselines=Baselines(), sweep=Sweep()))


def _sources(experts: Mapping[str, Expert]) -> dict[str, set[str]]:
    """The SFT sources of each expert that has any."""
    return {name: set(expert.sft.data) for name, expert in experts.items() if expert.sft}


def numbered(what: str, number: int, known: list[Version]) -> Version:
    found = next((version for version in known if version.version == number), None)
    if found is None:
        there = ", ".join(str(v.version) for v in sorted(known, key=lambda v: v.version))
        raise UserError(f"no {what} has the number {number}; there are {there}")
    return found


def experts_of(recipe: Recipe, model: Version) -> dict[str, Version]:
    """The published experts of a published model, in the order of its slots."""
    found = {}
    for domain, number in model.experts.items():
        validate.pick("expert", domain, recipe.experts)  # its SFT data is the router's
        known = registry.versions(recipe.storage, domain)
        found[domain] = numbered(f"version of '{domain}'", number, known)
    return found


def compose(recipe: Recipe, experts: Mapping[str, Version]) -> Pipeline:
    """A model of published experts of one base: what comes after them, and its scores."""
    graph = Builder(with_experts(recipe, {name: recipe.experts[name] for name in experts}))
    base, branch, merged, stages = _merged(graph, experts)
    bar = graph.route(merged)
    return Pipeline(base, branch, stages, merged, bar, {"bar": graph.evaluate("bar", bar)})


def subset(recipe: Recipe, model: Version, experts: Mapping[str, Version]) -> Pipeline:
    """Some experts of a published model, with its router's rows for them: nothing is trained."""
    kept = with_experts(recipe, {name: recipe.experts[name] for name in experts})
    graph = Builder(kept)
    base, branch, merged, stages = _merged(graph, experts)
    slots = ["anchor", *model.experts]
    rows = {"rows": [0, *(slots.index(name) for name in experts)]}
    inputs = {"merged": merged, "routed": published(recipe, model)}
    bar = graph.step("subset", "+".join(experts), rows, inputs)
    return Pipeline(base, branch, stages, merged, bar, {"bar": graph.evaluate(bar.name, bar)})


def _merged(
    graph: Builder, experts: Mapping[str, Version]
) -> tuple[Step, Step, Step, dict[str, dict[str, Step]]]:
    """The base, the branch, published experts merged, and the stages that each went through."""
    recipe = graph.recipe
    base, branch = graph.start()
    for name, version in experts.items():
        if line_of(branch) not in version.lineage:
            raise UserError(
                f"version {version.version} of '{name}' was trained from another base than this "
                "recipe's (base, tiny or seed differ), so it cannot be merged with the others"
            )
    steps = {name: published(recipe, version) for name, version in experts.items()}
    stages = {name: _own_stages(recipe, name, version) for name, version in experts.items()}
    return base, branch, graph.merge(branch, steps), stages


def as_published(recipe: Recipe, model: Version, experts: Mapping[str, Version]) -> Pipeline:
    """A published model as it was made, whatever the recipe says today."""
    graph = Builder(recipe)
    graph.dense()
    bar = published(recipe, model)
    base, branch, merged = (
        next(_recorded(recipe, line) for line in model.lineage if line.startswith(beginning))
        for beginning in (("train base ", "import post_trained "), "branch ", "merge ")
    )
    stages = {name: _own_stages(recipe, name, version) for name, version in experts.items()}
    return Pipeline(base, branch, stages, merged, bar, {"bar": graph.evaluate("bar", bar)})
