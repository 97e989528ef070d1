"""Changing one expert of a finished model: replace it, add one, remove one, go back.

A model is which version of which expert. A change reruns the merge, the router and the scores;
every other expert stays as it is, byte for byte, and the model before stays in the registry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from bar_ray import export, registry, versions
from bar_ray.categories import OVERALL
from bar_ray.claims.table import Table
from bar_ray.graph import Step, topological
from bar_ray.log import duration
from bar_ray.pipeline import Pipeline
from bar_ray.recipe import Recipe
from bar_ray.registry import MODEL, MODELS, Version
from bar_ray.report import collect, history
from bar_ray.types import UserError
from bar_ray.validate import pick


@dataclass(frozen=True)
class Change:
    """One of `replace`, `add`, `remove`, `rollback`.

    Args:
        domain: of the expert, or empty for `rollback`.
        version: of the expert (or of the model, for `rollback`); 0 is the newest (the one before).
    """

    kind: str
    domain: str = ""
    version: int = 0


@dataclass(frozen=True)
class Upgrade:
    """A change worked out: the versions of the experts before and after it."""

    recipe: Recipe
    before: Version
    after: Mapping[str, Version]
    published: Version | None = None  # the model itself, when it is there already

    @cached_property
    def model(self) -> Pipeline:
        if self.published:
            return versions.as_published(self.recipe, self.published, self.after)
        return versions.compose(self.recipe, self.after)

    @cached_property
    def old_model(self) -> Pipeline:
        experts = versions.experts_of(self.recipe, self.before)
        return versions.as_published(self.recipe, self.before, experts)

    @property
    def targets(self) -> list[Step]:
        """The old model's scores too, for the comparison; they are there already."""
        return [self.model.scores["bar"], self.old_model.scores["bar"]]

    @cached_property
    def scores(self) -> Table:
        """Of the models `before` and `after`, once they are there."""
        models = {"before": self.old_model, "after": self.model}
        return Table.read({self.recipe.seed: {n: m.scores["bar"] for n, m in models.items()}})

    def publish(self) -> int:
        """Make the new model the newest of the registry; returns its number."""
        if self.published:
            return registry.publish(self.recipe.storage, MODEL, self.published, MODELS).version
        categories = (*self.scores.categories, OVERALL)
        scores = {c: self.scores.score("after", c).mean for c in categories}
        numbers = {domain: version.version for domain, version in self.after.items()}
        return versions.publish_model(self.recipe, self.model.bar, numbers, scores)

    def export(self) -> str:
        """Put the new model at `<storage>/model/`; returns its folder."""
        kept = replace(self.recipe, experts={n: self.recipe.experts[n] for n in self.after})
        return export.export(self.model, kept, collect(self.model.scores))


def work_out(recipe: Recipe, change: Change) -> Upgrade:
    """What a change means for the model published last."""
    known = registry.versions(recipe.storage, MODEL, MODELS)
    if not known:
        raise UserError(
            f"{recipe.storage} has no published model to change: run jobs/train_all.py first"
        )
    current = known[-1]
    if change.kind == "rollback":
        earlier = _earlier(known, change.version)
        return Upgrade(recipe, current, versions.experts_of(recipe, earlier), earlier)
    experts = versions.experts_of(recipe, current)
    _check(change, experts, recipe)
    if change.kind == "remove":
        del experts[change.domain]
        return Upgrade(recipe, current, experts)
    return Upgrade(recipe, current, {**experts, change.domain: _version(recipe, change)})


def _check(change: Change, experts: Mapping[str, Version], recipe: Recipe) -> None:
    if change.kind == "add":
        pick("expert", change.domain, recipe.experts)
        if change.domain in experts:
            raise UserError(f"the model has an expert '{change.domain}' already: --replace it")
        return
    pick("expert", change.domain, experts)
    if change.kind == "remove" and len(experts) == 1:
        raise UserError(f"'{change.domain}' is the only expert of the model")


def _version(recipe: Recipe, change: Change) -> Version:
    known = registry.versions(recipe.storage, change.domain)
    if not known:
        raise UserError(
            f"no version of '{change.domain}' is published: "
            f"run jobs/train_expert.py with --expert {change.domain}"
        )
    wanted = change.version or known[-1].version
    return versions.numbered(f"version of '{change.domain}'", wanted, known)


def _earlier(known: list[Version], number: int) -> Version:
    below = [version.version for version in known if version.version < known[-1].version]
    if not number and not below:
        raise UserError("the model has no earlier version to go back to")
    return versions.numbered("version of the model", number or max(below), known)


def table(upgrade: Upgrade) -> str:
    """Scores before and after; what it cost, beside what training everything again would."""
    lines = [f"{'':<12}{'before':>9}{'after':>9}   difference, 95 % over test items"]
    scores = upgrade.scores
    for category in (*scores.categories, OVERALL):
        before, after = (scores.score(name, category).mean for name in ("before", "after"))
        moved = scores.difference("after", "before", category)
        noise = "" if moved.is_above or moved.is_below else "  within noise"
        lines.append(f"{category:<12}{before:>9.1f}{after:>9.1f}   {moved}{noise}")
    return "\n".join([*lines, cost(upgrade)])


def cost(upgrade: Upgrade) -> str:
    """Tokens and seconds of what the change trains, against all experts and the router."""
    if upgrade.published:
        return "trained for this: nothing, the model was there"
    branch = {*map(versions.line_of, topological([upgrade.model.branch]))}
    router = versions.line_of(upgrade.model.bar)

    def own(domain: str) -> set[str]:
        return {*upgrade.after[domain].lineage} - branch

    changed = [
        domain
        for domain, version in upgrade.after.items()
        if upgrade.before.experts.get(domain) != version.version
    ]
    ours = {router}.union(*map(own, changed))
    theirs = {router}.union(*map(own, upgrade.after))
    past = history.of_lines(upgrade.recipe.storage, ours | theirs)

    def of(lines: set[str]) -> str:
        rows = [row for line in lines for row in past.get(line, ())]
        tokens, seconds = history.tokens_of(rows), history.seconds_of(rows)
        return f"{tokens / 1e6:,.2f} million tokens in {duration(seconds)} of steps"

    return f"trained for this: {of(ours)}; all experts and the router: {of(theirs)}"
