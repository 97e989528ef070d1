"""Some experts of a finished model, as a model of their own.

Nothing is trained: the experts that stay are merged again, and the router keeps its rows for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from bar_ray import export, registry, versions
from bar_ray.pipeline import Pipeline
from bar_ray.recipe import Recipe
from bar_ray.registry import MODEL, MODELS, Version
from bar_ray.report import collect
from bar_ray.types import UserError
from bar_ray.validate import pick


@dataclass(frozen=True)
class Subset:
    """The newest published model, and which of its experts stay, in the order of its slots."""

    recipe: Recipe
    model: Version
    experts: tuple[str, ...]

    @property
    def left_out(self) -> list[str]:
        return [name for name in self.model.experts if name not in self.experts]

    @cached_property
    def pipeline(self) -> Pipeline:
        known = versions.experts_of(self.recipe, self.model)
        kept = {name: known[name] for name in self.experts}
        return versions.subset(self.recipe, self.model, kept)

    def export(self) -> str:
        """Put it at `<storage>/subsets/<experts>/` with a card; returns the folder."""
        kept = replace(self.recipe, experts={n: self.recipe.experts[n] for n in self.experts})
        return export.export(self.pipeline, kept, collect(self.pipeline.scores), self.left_out)


def work_out(recipe: Recipe, experts: Sequence[str] = (), without: Sequence[str] = ()) -> Subset:
    """The experts of the newest model that are named, or all but some."""
    model = registry.latest(recipe.storage, MODEL, MODELS)
    if model is None:
        raise UserError(f"{recipe.storage} has no published model: run jobs/train_all.py first")
    for name in (*experts, *without):
        pick("expert", name, model.experts)
    kept = tuple(n for n in model.experts if n not in without and (not experts or n in experts))
    if not kept:
        raise UserError("no expert is left: the anchor alone is the base model")
    if len(kept) == len(model.experts):
        raise UserError(f"these are all experts of the model, which is at {recipe.storage}/model")
    return Subset(recipe, model, kept)
