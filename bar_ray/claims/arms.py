"""Every model that a claim of the paper compares, as steps of one build graph.

Each model is described by what it differs in from the recipe's own, so that arms share all they
can: the dense base, tokenised data, experts, the router's sample.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bar_ray import builder, pipeline, versions
from bar_ray.claims.joint import dense, joint
from bar_ray.graph import Step
from bar_ray.recipe import Expert, Learn, Merge, Recipe, Rlvr, Stage
from bar_ray.types import UserError


class Arms(builder.Builder):
    """The models of one recipe (one seed), by name, and their evaluations.

    `seed` is what steps are labelled with where there are several.
    """

    def __init__(self, recipe: Recipe, seed: str = "") -> None:
        super().__init__(recipe, seed)
        self.seed = seed
        self.base, self.pretrained = self.dense()
        self.bar = pipeline.build(recipe, seed)
        self.models: dict[str, Step] = {}
        self.composed: dict[str, Step] = {}  # evaluations that are put together from others
        own = self.bar.scores.values()
        self.evaluations = {each.inputs["model"].fingerprint: each for each in own}

    def add(self, name: str, model: Step) -> Step:
        """A model that is to be scored."""
        self.models[name] = model
        return model

    @property
    def scores(self) -> dict[str, Step]:
        """The evaluation of every model, by its name."""
        return {n: self.evaluation(m) for n, m in self.models.items()} | self.composed

    def evaluation(self, model: Step) -> Step:
        """One for two names of a model; the recipe's own where there is one."""
        if model.fingerprint not in self.evaluations:
            name = next(n for n, each in self.models.items() if each is model)
            self.evaluations[model.fingerprint] = self.evaluate(name, model)
        return self.evaluations[model.fingerprint]

    def stages(self, kind: str) -> dict[str, Any]:
        """The experts' stages of a kind, by domain."""
        found = {name: getattr(expert, kind) for name, expert in self.recipe.experts.items()}
        return {name: stage for name, stage in found.items() if stage is not None}

    # --- BAR with something changed ---------------------------------------------------------------

    def variant(self, name: str, **changed: Any) -> pipeline.Pipeline:
        """The whole method with other settings of the recipe; its routed model is scored."""
        recipe = replace(self.recipe, **changed)
        versions.check_model(recipe)
        built = pipeline.build(recipe, self._arm(name))
        self.add(name, built.bar)
        return built

    def with_expert(self, name: str, domain: str, expert: Expert | None) -> pipeline.Pipeline:
        """One expert replaced, or left out when it is None."""
        experts = {**self.recipe.experts, domain: expert}
        kept = {key: each for key, each in experts.items() if each is not None}
        recipe = versions.with_experts(self.recipe, kept)
        return self.variant(name, experts=kept, router=recipe.router)

    def expert(self, name: str, domain: str, expert: Expert) -> Step:
        """An expert alone, with other settings; scored as it is."""
        with self._naming(name):
            stages = self.adapt(domain, expert, self.bar.branch)
        return self.add(name, [*stages.values()][-1])

    @contextlib.contextmanager
    def _naming(self, arm: str) -> Iterator[None]:
        """Steps made meanwhile are for this arm."""
        self.arm = self._arm(arm)
        yield
        self.arm = self.seed

    def _arm(self, name: str) -> str:
        return f"{self.seed}: {name}" if self.seed else name

    def with_router(self, name: str, **changed: Any) -> Step:
        """The merged model with another router training."""
        return self.variant(name, router=replace(self.recipe.router, **changed)).bar

    def with_merge(self, name: str, merge: Merge) -> Step:
        return self.variant(name, merge=merge).bar

    # --- without branches -------------------------------------------------------------------------

    def train(self, name: str, stage: Stage, model: Step, kind: str = "messages") -> Step:
        """A language-model stage of a dense model."""
        return self.lm("train", name, dense(stage, self.recipe.baselines.learn), model, kind)

    def reinforce(self, name: str, stages: Mapping[str, Rlvr], model: Step) -> Step:
        """RLVR of a dense model, on the prompts of one or several domains, if there are any."""
        if not stages:
            return model
        stage = joint(list(stages.values()))
        held_out = stage.held_out if len(stages) == 1 else ""
        learn = self.recipe.baselines.rlvr
        return self.rlvr(name, replace(stage, learn=learn, held_out=held_out), model)

    def retrain(self, name: str, with_midtrain: bool) -> Step:
        """From the pretrained model, all data of a kind at once (the paper's retraining)."""
        model = self.pretrained
        if with_midtrain and (midtrains := list(self.stages("midtrain").values())):
            model = self.train(f"{name}-midtrain", joint(midtrains), model, "text")
        sft = self.all_sft()
        if self.recipe.tiny is not None:  # what made the pretrained model the post-trained one
            sft.append(self.recipe.tiny.post_train)
        model = self.add(f"{name} sft", self.train(f"{name}-sft", joint(sft), model))
        return self.add(name, self.reinforce(name, self.stages("rlvr"), model))

    def all_sft(self) -> list[Stage]:
        """The SFT of every expert, and as much of the router's sources as the router takes."""
        router = self.recipe.router
        return [*self.stages("sft").values(), replace(router, data=self.router_data()[0])]

    def continued(self, name: str) -> Step:
        """The base through SFT and RLVR on all domains at once, as published."""
        model = self.train(f"{name}-sft", joint(self.all_sft()), self.base)
        return self.add(name, self.reinforce(name, self.stages("rlvr"), model))

    def one_by_one(self, name: str) -> Step:
        """The base through every domain's stages, one domain after the other."""
        model = self.base
        for domain in self.recipe.experts:
            model = self.adapted(f"{name}-{domain}", domain, model)
            self.add(f"{name} to {domain}", model)
        return self.add(name, model)

    def adapted(self, name: str, domain: str, model: Step, with_midtrain: bool = True) -> Step:
        """A dense model through the stages of one domain."""
        expert = self.recipe.experts[domain]
        if expert.midtrain and with_midtrain:
            model = self.train(f"{name}-midtrain", expert.midtrain, model, "text")
        if expert.sft:
            model = self.train(f"{name}-sft", expert.sft, model)
        if expert.rlvr:
            model = self.reinforce(name, {domain: expert.rlvr}, model)
        return model

    def specialists(self, with_midtrain: bool) -> dict[str, Step]:
        """A dense model per domain. Mid-training starts from the pretrained model, as published."""
        found = {}
        for domain, expert in self.recipe.experts.items():
            midtrained = with_midtrain and expert.midtrain is not None
            start = self.pretrained if midtrained else self.base
            name = f"dense-{domain}" if midtrained else f"dense-{domain}-post"
            found[domain] = self.adapted(name, domain, start, with_midtrain)
        return found

    def averaged(self, name: str, models: Mapping[str, Step], merge: Merge) -> Step:
        """Dense models made one dense model."""
        return self.add(name, self.step("average", name, merge, self._with_base(models)))

    def routed(self, name: str, moe: Step) -> Step:
        """A MoE with its router trained as the recipe says."""
        with self._naming(name):
            return self.add(name, self.route(moe))

    def btx(self, name: str, models: Mapping[str, Step], merge: Merge) -> Step:
        """Dense models as the experts of a MoE, untrained as a whole."""
        base = self.recipe.base
        settings = {"merge": merge, "router_std": base.router_std, "seed": self.recipe.seed}
        return self.step("btx", name, settings, self._with_base(models))

    def _with_base(self, models: Mapping[str, Step]) -> dict[str, Step]:
        return {"base": self.base, **{f"model:{name}": step for name, step in models.items()}}

    def finetuned(self, name: str, moe: Step) -> Step:
        """A MoE finetuned as a whole on the router's sample, for as many steps as the router."""
        router = self.recipe.router
        sources, tokens = self.router_data()
        rates = next(iter(self.stages("sft").values()))
        stage = replace(dense(router, self.recipe.baselines.finetune), lr=rates.lr, data=sources)
        settings = {"stage": stage, "shares": sources, "seed": self.recipe.seed}
        return self.add(name, self.step("train", name, settings, {"model": moe, **tokens}))

    def adapters(self, name: str) -> None:
        """A LoRA adapter per domain on the base, and a router that picks one per prompt."""
        recipe, settings = self.recipe, self.recipe.baselines.lora
        models, adapter_of = {GENERAL: self.base}, {general_data(recipe): GENERAL}
        for domain, sft in self.stages("sft").items():
            learn = Learn(embedding=sft.learn.embedding, lm_head=sft.learn.lm_head)
            stage = replace(dense(sft, learn), lr=settings.lr)
            plain = self.lm("lora", domain, stage, self.base, "messages")
            models[domain] = replace(plain, settings={**plain.settings, "lora": settings})
            adapter_of |= {source: domain for source in sft.data if source not in adapter_of}
        shares, tokens = self.router_data()
        sample = next(iter(tokens.values())).inputs["sample"]
        data, world = self.tests(recipe.evaluate.categories)
        known = {source: adapter_of.get(source, GENERAL) for source in shares}
        router = self.step(
            "adapter_router",
            "adapters",
            {"adapter": known, "seed": recipe.seed},
            {"base": self.base, "sample": sample, **world},
            data,
        )
        for domain, model in models.items():
            self.add("base" if domain == GENERAL else f"LoRA {domain}", model)
        scores = {f"scores:{d}": self.evaluation(model) for d, model in models.items()}
        self.composed[name] = self.step("routed", "adapters", {}, {"router": router, **scores})


GENERAL = "general"


def general_data(recipe: Recipe) -> str:
    """The dataset that every expert's SFT has a share of."""
    mixes = [set(expert.sft.data) for expert in recipe.experts.values() if expert.sft]
    common = set.intersection(*mixes)
    if len(common) != 1:
        raise UserError(
            "the experts' SFT mixtures must share one dataset, the general one, "
            f"not {sorted(common)}"
        )
    return common.pop()


def frozen(learn: Learn, *roles: str) -> Learn:
    """The freeze table with these roles frozen too."""
    return replace(learn, **dict.fromkeys(roles, 0.0))
