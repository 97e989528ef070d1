"""Export: the routed model as `<storage>/model/`, a plain Hugging Face folder with a model card.

Some of its experts, as a model of their own, are at `<storage>/subsets/<experts>/`.

The folder is an artifact like any other (`MANIFEST.json` last), but at a fixed place: a new model
replaces the old one, and the same model with the same card is left alone. Only safetensors and JSON
go in; nothing executable, nothing that needs remote code.

Left out: keeping a reader on the old model while it is replaced; between the two there is none.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from bar_ray import families, storage
from bar_ray.categories import OVERALL
from bar_ray.families import Family
from bar_ray.graph import Step
from bar_ray.pipeline import Pipeline
from bar_ray.recipe import Recipe
from bar_ray.report.scores import markdown
from bar_ray.storage import Manifest

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("report") / "card.md.j2"
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]


def export(pipeline: Pipeline, recipe: Recipe, scores: Scores, left_out: Sequence[str] = ()) -> str:
    """Put the routed model at `<storage>/model/` and return the folder that holds its files.

    That is `<storage>/model` itself on a local disk; on an object store it is the folder below it
    that the manifest names. Of a model with experts `left_out`, it is `<storage>/subsets/<name>`.
    """
    place = ("subsets", pipeline.bar.name) if left_out else ("model",)
    target = storage.join(recipe.storage, *place)
    text = card(pipeline, recipe, scores, left_out)
    manifest = storage.read_manifest(target)
    if manifest is None or not _is_current(target, manifest, pipeline.bar, text):
        source = storage.fetch(pipeline.bar.artifact.uri)
        output = storage.scratch(storage.staging_folder(recipe.storage))
        try:
            _gather(Path(source), Path(output), text)
            _write_tasks(pipeline, source, Path(output))
            storage.delete(target)
            manifest = storage.commit(output, target, lineage(pipeline))
        finally:
            storage.discard(output)
    return storage.join(target, manifest.data)


def _is_current(target: str, manifest: Manifest, bar: Step, text: str) -> bool:
    """Same model, same card, and every file is there in its size."""
    card_sha256 = manifest.files.get(CARD, {}).get("sha256")
    if manifest.info.get("fingerprint") != bar.fingerprint:
        return False
    if card_sha256 != hashlib.sha256(text.encode()).hexdigest():
        return False
    filesystem, path = storage.resolve(storage.join(target, manifest.data))
    found = filesystem.get_file_info([f"{path}/{name}" for name in manifest.files])
    return [info.size for info in found] == [f["size"] for f in manifest.files.values()]


def _gather(source: Path, output: Path, text: str) -> None:
    """Links to what a checkpoint consists of (committing copies them), and the card."""
    from bar_ray.model.adopt import KEPT

    for file in sorted(source.iterdir()):
        if file.name in KEPT or file.suffix == ".safetensors":
            (output / file.name).symlink_to(file.resolve())
    generation = output / "generation_config.json"
    if not generation.exists():
        config = json.loads((source / "config.json").read_text())
        ends = {k: v for k, v in config.items() if re.fullmatch("(bos|eos|pad)_token_id", k)}
        generation.write_text(json.dumps(ends, indent=2, sort_keys=True))
    (output / CARD).write_text(text)


def _write_tasks(pipeline: Pipeline, source: str, output: Path) -> None:
    """What the model was scored on, for others to score it on."""
    from bar_ray.cluster.run import Run
    from bar_ray.evaluate import items, tasks

    scored = pipeline.scores["bar"]
    asked = [
        item
        for category in scored.data
        for item in items.test_items(
            source, category, Run.locate(scored, category), scored.settings.limit
        )
    ]
    tasks.write(output / tasks.FOLDER, source, asked, scored.settings)


def lineage(pipeline: Pipeline) -> dict[str, Any]:
    """Which artifacts the model was made from."""
    experts = {
        domain: {stage: step.fingerprint for stage, step in stages.items()}
        for domain, stages in pipeline.stages.items()
    }
    return {
        "verb": "export",
        "name": "model",
        "fingerprint": pipeline.bar.fingerprint,
        "base": pipeline.base.fingerprint,
        "branch": pipeline.branch.fingerprint,
        "experts": experts,
        "merged": pipeline.merged.fingerprint,
    }


def _family(bar: Step, exported: str) -> Family:
    """Of the model, which may be there no more but as what was exported of it."""
    place = bar.artifact.uri if storage.read_manifest(bar.artifact.uri) else exported
    uri = storage.join(place, storage.verify(place).data, "config.json")
    family = families.of_moe(storage.read_json(uri))
    assert family is not None, f"{uri} was merged, so it is a mixture of experts"
    return family


def card(pipeline: Pipeline, recipe: Recipe, scores: Scores, left_out: Sequence[str] = ()) -> str:
    """The model card; the same for the same model and scores."""
    final, made_from = scores["models"].get("bar", {}), lineage(pipeline)
    family = _family(pipeline.bar, storage.join(recipe.storage, "model"))
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="bar_ray",
            dataset_name=f"{category} (held out)",
            dataset_config=category,  # results of one dataset and config would be one result
            metric_type="accuracy",
            metric_name="percent right",
            metric_value=round(value, 2),
        )
        for category, value in final.items()
        if category != OVERALL
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["bar", "bar_ray", family.moe, "mixture-of-experts", "modular"],
        model_name="bar",
        eval_results=results,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        moe_class=family.moe_class,
        domains=list(pipeline.stages),
        lineage=made_from,
        slots=_slots(made_from),
        table=markdown(scores) if scores["models"] else "Nothing was scored.",
        top_k=min(recipe.router.top_k or len(pipeline.stages) + 1, len(pipeline.stages) + 1),
        left_out=left_out,
        seed=recipe.seed,
    ).content


def _slots(made_from: dict[str, Any]) -> str:
    """What each expert of the model is and which steps made it, as a Markdown table."""
    rows = [("anchor", {verb: made_from[verb] for verb in ("base", "branch")})]
    rows += made_from["experts"].items()
    lines = ["| slot | name | made by |", "| ---: | --- | --- |"]
    for slot, (name, steps) in enumerate(rows):
        chain = ", ".join(f"{verb} `{fingerprint}`" for verb, fingerprint in steps.items())
        lines.append(f"| {slot} | {name} | {chain} |")
    return "\n".join(lines)
