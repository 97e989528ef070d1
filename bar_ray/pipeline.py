"""The whole method, as a build graph.

    base -> branch -> adapt (midtrain | sft | rlvr)* -> merge -> route -> evaluate
            \\______ once per expert, in parallel ____/  \\__ cheap, rerun at every upgrade

Nothing runs here: `build` says what depends on what, `cluster.run.execute` runs what is not there
yet. The steps themselves are made in `builder.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bar_ray import validate
from bar_ray.builder import Builder
from bar_ray.categories import plain
from bar_ray.graph import Step
from bar_ray.recipe import Recipe
from bar_ray.types import UserError


@dataclass(frozen=True)
class Pipeline:
    """Every step of a recipe by what it is for."""

    base: Step
    branch: Step
    stages: dict[str, dict[str, Step]]  # domain -> stage -> step, in order
    merged: Step
    bar: Step
    scores: dict[str, Step]  # model name -> its evaluation

    @property
    def experts(self) -> dict[str, Step]:
        """Each domain's finished expert."""
        return {domain: list(stages.values())[-1] for domain, stages in self.stages.items()}

    @property
    def targets(self) -> list[Step]:
        return [self.bar, *self.scores.values()]


def build(recipe: Recipe, arm: str = "") -> Pipeline:
    """The build graph of a recipe; `arm` names it where there are several."""
    graph = Builder(recipe, arm)
    base, branch = graph.start()
    stages = {name: graph.adapt(name, expert, branch) for name, expert in recipe.experts.items()}
    merged = graph.merge(branch, {name: list(done.values())[-1] for name, done in stages.items()})
    bar = graph.route(merged)

    models = {"base": base, "merged": merged, "bar": bar}
    for domain, done in stages.items():
        scored = {*recipe.evaluate.stages, [*done][-1]}
        models |= {f"{domain} {stage}": step for stage, step in done.items() if stage in scored}
    scores = {name: graph.evaluate(name, model) for name, model in models.items()}
    return Pipeline(base, branch, stages, merged, bar, scores)


def evaluate_folder(recipe: Recipe, uri: str) -> Step:
    """The evaluation of a checkpoint from anywhere."""
    graph = Builder(recipe)
    name = uri.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
    return graph.evaluate(name, graph.imported(name, uri))


def rollouts(recipe: Recipe, domain: str, steps: int) -> Step:
    """Graded rollouts of the model that enters the RLVR stage of an expert."""
    stage = recipe.experts[domain].rlvr
    if stage is None:
        raise UserError(f"experts.{domain} has no `rlvr` stage to sample for")
    rlvr = build(recipe).stages[domain]["rlvr"]
    settings = {**rlvr.settings, "steps": steps}
    return replace(rlvr, verb="rollouts", settings=settings)


def data_checks(recipe: Recipe, names: Sequence[str] = (), kind: str = "") -> list[Step]:
    """A look at every use of the recipe's data, or of some datasets, or of some as a kind."""
    graph = Builder(recipe)
    tokenizer = graph.tokenizer_alone()
    found = uses(recipe)
    for name in names:
        validate.pick("dataset", name, recipe.datasets)
        if not kind and name not in {used for used, _ in found}:
            raise UserError(f"datasets.{name} is used by no stage: say what it is with --kind")
        if kind:
            found.setdefault((name, kind), max(found.values()))
    chosen = [use for use in found if not names or use[0] in names]
    steps = [
        graph.check(name, recipe.datasets[name], each, found[name, each], tokenizer)
        for name, each in chosen
        if not kind or each == kind
    ]
    if not names and kind in ("", "prompts"):
        longest = max(found.values())
        steps += [
            graph.check(f"test-{plain(name)}", dataset, "prompts", longest, tokenizer)
            for name, dataset in recipe.evaluate.categories.items()
        ]
    return steps


def uses(recipe: Recipe) -> dict[tuple[str, str], int]:
    """(dataset, kind) -> the fewest tokens that a stage gives its rows."""
    tiny, found = recipe.tiny, {}
    stages = [(tiny.pretrain, "text"), (tiny.post_train, "messages")] if tiny else []
    for expert in recipe.experts.values():
        stages += [(expert.midtrain, "text"), (expert.sft, "messages"), (expert.rlvr, "prompts")]
        if expert.rlvr and expert.rlvr.held_out:
            stages.append((replace(expert.rlvr, data={expert.rlvr.held_out: 1.0}), "prompts"))
    stages.append((recipe.router, "messages"))
    for stage, kind in stages:
        for name in stage.data if stage else ():
            found[name, kind] = min(stage.seq_len, found.get((name, kind), stage.seq_len))
    return found
