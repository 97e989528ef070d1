"""The whole method, as a build graph.

    base -> branch -> adapt (midtrain | sft | rlvr)* -> merge -> route -> evaluate
            \\______ once per expert, in parallel ____/  \\__ cheap, rerun at every upgrade

Nothing runs here: `build` says what depends on what, `cluster.run.execute` runs what is not there
yet.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bar_ray import registry, storage, validate
from bar_ray.graph import Published, Step, topological
from bar_ray.recipe import STAGES, Baselines, Dataset, Expert, Recipe, Reproduce, Stage, Sweep
from bar_ray.registry import Version
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


def compose(recipe: Recipe, experts: Mapping[str, Version]) -> Pipeline:
    """A model of published experts of one base: what comes after them, and its scores."""
    recipe = with_experts(recipe, {name: recipe.experts[name] for name in experts})
    graph = Builder(recipe)
    base, branch = graph.start()
    for name, version in experts.items():
        if line_of(branch) not in version.lineage:
            raise UserError(
                f"version {version.version} of '{name}' was trained from another base than this "
                "recipe's (base, tiny or seed differ), so it cannot be merged with the others"
            )
    steps = {name: published(recipe, version) for name, version in experts.items()}
    merged = graph.merge(branch, steps)
    bar = graph.route(merged)
    stages = {name: _own_stages(recipe, name, version) for name, version in experts.items()}
    return Pipeline(base, branch, stages, merged, bar, {"bar": graph.evaluate("bar", bar)})


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
        tests = {name: Dataset(uri) for name, uri in recipe.evaluate.categories.items()}
        longest = max(found.values())
        steps += [
            graph.check(f"test-{n}", d, "prompts", longest, tokenizer) for n, d in tests.items()
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


class Builder:
    """Makes steps of one recipe."""

    def __init__(self, recipe: Recipe, arm: str = "") -> None:
        self.recipe, self.arm = recipe, arm
        self.tokenizer: Step | None = None
        self.world: Step | None = None
        if recipe.tiny is not None:
            self.world = self.step("world", "tiny", {"seed": recipe.seed}, {})

    def step(self, verb: str, name: str, settings: object, inputs: dict, data=None) -> Step:
        place = name.replace(" ", "-")
        return Step(verb, place, settings, inputs, data or {}, self.recipe.storage, arm=self.arm)

    def start(self) -> tuple[Step, Step]:
        """The dense base, and the branch that every expert starts from."""
        base, pretrained = self.dense()
        settings = {"router_std": self.recipe.base.router_std, "seed": self.recipe.seed}
        both = {"post_trained": base, "pretrained": pretrained}
        return base, self.step("branch", "base", settings, both)

    def dense(self) -> tuple[Step, Step]:
        """The post-trained base and the pretrained one: imported, or trained in the small world.

        Whichever comes first brings the tokenizer of the whole run.
        """
        base, tiny = self.recipe.base, self.recipe.tiny
        if tiny is None:
            post = self.tokenizer = self.imported("post_trained", base.post_trained)
            return post, self.imported("pretrained", base.pretrained) if base.pretrained else post
        untrained = self.tokenizer = self.step("init", "tiny", {"seed": self.recipe.seed}, {})
        pretrained = self.lm("train", "pretrained", tiny.pretrain, untrained, "text")
        return self.lm("train", "base", tiny.post_train, pretrained, "messages"), pretrained

    def tokenizer_alone(self) -> Step:
        """What renders the data, without the weights beside it."""
        if self.recipe.tiny is not None:
            return self.step("init", "tiny", {"seed": self.recipe.seed}, {})
        uri = self.recipe.base.post_trained
        content = storage.fingerprint_files(uri, storage.TOKENIZER_FILES)
        return self.step("tokenizer", "base", {}, {}, {"checkpoint": (uri, content)})

    def check(self, name: str, dataset: Dataset, kind: str, seq_len: int, tokenizer: Step) -> Step:
        rows, world = self.located(dataset.uri)
        settings = {"dataset": replace(dataset, uri=""), "kind": kind, "seq_len": seq_len}
        inputs = {"tokenizer": tokenizer, **world}
        return self.step("check", name, settings, inputs, {"rows": rows})

    def imported(self, name: str, uri: str) -> Step:
        content = storage.fingerprint_files(uri, storage.CHECKPOINT_FILES)
        data = {"checkpoint": (uri, content)}
        return self.step("import", name, {}, {}, data)

    def adapt(self, domain: str, expert: Expert, branch: Step) -> dict[str, Step]:
        """One expert through its stages."""
        done: dict[str, Step] = {}
        model = branch
        for name in STAGES:
            stage = getattr(expert, name)
            if stage is None:
                continue
            if name == "rlvr":
                model = self.rlvr(domain, stage, model)
            else:
                kind = "text" if name == "midtrain" else "messages"
                model = self.lm(name, domain, stage, model, kind)
            done[name] = model
        return done

    def lm(self, verb: str, name: str, stage: Stage, model: Step, kind: str) -> Step:
        """A language-model stage on a mixture of tokenised datasets."""
        tokens = {f"data:{d}": self.tokenise(d, kind, stage.seq_len) for d in stage.data}
        settings = {"stage": stage, "shares": dict(stage.data), "seed": self.recipe.seed}
        return self.step(verb, name, settings, {"model": model, **tokens})

    def tokenise(self, dataset: str, kind: str, seq_len: int) -> Step:
        rows, made = self.dataset(dataset, kind)
        settings = {"kind": kind, "seq_len": seq_len}
        inputs = {"tokenizer": self.tokenizer, **made}
        return self.step("tokenise", f"{dataset}-{seq_len}", settings, inputs, {"rows": rows})

    def dataset(
        self, name: str, kind: str, trained_on: bool = True
    ) -> tuple[tuple[str, str], dict[str, Step]]:
        """The rows of a dataset, as they are or prepared, and the steps that make them."""
        dataset = self.recipe.datasets[name]
        against = self.recipe.decontaminate if trained_on else None
        rows, world = self.located(dataset.uri)
        if dataset.is_plain and against is None:
            return rows, world
        settings = {"dataset": replace(dataset, uri=""), "kind": kind, "decontaminate": against}
        data, inputs = {"rows": rows}, world
        if against is not None:
            tests, made = self.tests(against.against or self.recipe.evaluate.categories)
            data |= {f"test:{category}": rows for category, rows in tests.items()}
            inputs = inputs | made
        step = self.step("prepare", name, settings, inputs, data)
        place = f"prepared-{name}"
        return (f"{place}:rows", name), {place: step}

    def tests(self, categories: Iterable[str]) -> tuple[dict, dict]:
        data, inputs = {}, {}
        for name in categories:
            data[name], made = self.located(self.recipe.evaluate.categories[name])
            inputs |= made
        return data, inputs

    def located(self, uri: str) -> tuple[tuple[str, str], dict[str, Step]]:
        """(URI, content fingerprint) of a dataset, and the world's step when it is from there."""
        if uri.startswith("tiny:") and self.world is not None:
            return (uri, uri), {"tiny": self.world}
        return (uri, storage.fingerprint_files(uri)), {}

    def rlvr(self, domain: str, stage: Stage, model: Step) -> Step:
        data, inputs = self.datasets(stage.data, "prompts")
        if stage.held_out:
            data[stage.held_out], made = self.dataset(stage.held_out, "prompts", trained_on=False)
            inputs |= made
        if stage.replay:
            data["replay"] = (stage.replay, storage.fingerprint_files(stage.replay))
        settings = {"stage": stage, "seed": self.recipe.seed}
        return self.step("rlvr", domain, settings, {"model": model, **inputs}, data)

    def datasets(self, names: Iterable[str], kind: str) -> tuple[dict, dict]:
        data, inputs = {}, {}
        for name in names:
            data[name], made = self.dataset(name, kind)
            inputs |= made
        return data, inputs

    def merge(self, branch: Step, experts: dict[str, Step]) -> Step:
        inputs = {f"expert:{name}": step for name, step in experts.items()}
        if self.recipe.merge.rule == "fisher":
            inputs |= {f"fisher:{name}": self.fisher(name, step) for name, step in experts.items()}
        return self.step("merge", "merged", self.recipe.merge, {"base": branch, **inputs})

    def fisher(self, domain: str, expert: Step) -> Step:
        sft = self.recipe.experts[domain].sft
        one_by_one = replace(sft.run, num_workers=1, min_workers=1)
        rows = replace(sft, steps=self.recipe.merge.fisher_rows, batch_size=1, run=one_by_one)
        return self.lm("fisher", domain, rows, expert, "messages")

    def route(self, merged: Step) -> Step:
        """Router training on a stratified sample of every SFT source."""
        router, (shares, tokens) = self.recipe.router, self.router_data()
        settings = {"stage": router, "shares": shares, "seed": self.recipe.seed}
        settings["top_k"] = router.top_k
        return self.step("route", "bar", settings, {"model": merged, **tokens})

    def router_data(self) -> tuple[dict[str, float], dict[str, Step]]:
        """Shares by source, and the tokenised sample of each as inputs."""
        router = self.recipe.router
        sources = list(router.data) or sorted(
            {name for e in self.recipe.experts.values() if e.sft for name in e.sft.data}
        )
        data, inputs = self.datasets(sources, "messages")
        settings = {"fraction": router.fraction, "seed": self.recipe.seed}
        settings |= {"stratified": router.stratified, "natural": router.natural}
        sample = self.step("sample", "router", settings, inputs, data)
        if router.natural:
            return {"all": 1.0}, {"data:all": self.tokenise_sample("all", sample)}
        tokens = {f"data:{name}": self.tokenise_sample(name, sample) for name in sources}
        return {name: router.data.get(name, 1.0) for name in sources}, tokens

    def tokenise_sample(self, source: str, sample: Step) -> Step:
        settings = {"kind": "messages", "seq_len": self.recipe.router.seq_len}
        inputs = {"tokenizer": self.tokenizer, "sample": sample}
        rows = {"rows": (f"sample:{source}.jsonl", source)}
        return self.step("tokenise", f"router-{source}", settings, inputs, rows)

    def evaluate(self, name: str, model: Step) -> Step:
        data, made = self.tests(self.recipe.evaluate.categories)
        inputs = {"model": model, **made}
        return self.step("evaluate", name, self.recipe.evaluate, inputs, data)
