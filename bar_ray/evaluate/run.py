"""The `evaluate` verb: any checkpoint over all categories with vLLM actors under Ray Data.

Prompts go in as tokens and completions come back as tokens; the rewards that train also grade.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import ray

from bar_ray import rewards
from bar_ray.data import chat, formats
from bar_ray.recipe import Evaluate
from bar_ray.rollout.batch import BatchEngine
from bar_ray.rollout.records import check
from bar_ray.types import UserError, Verdict

BATCH_PROMPTS = 256


def run(step: Any, run: Any) -> None:
    """Inputs: `model`; data: one test file per category. Output: scores.json, samples.jsonl."""
    settings: Evaluate = step.settings
    folder = run.fetch(step.inputs["model"])
    items = [
        item
        for category in step.data
        for item in test_items(folder, category, run.locate(step, category), settings.limit)
    ]
    _require_positions(folder, items, settings)
    completions = generate(step.inputs["model"].artifact.uri, items, settings)
    sandbox = rewards.sandbox_for(run.recipe.sandbox)
    graded = [
        (c["text"], i["ground_truth"], i["verifier"])
        for i, c in zip(items, completions, strict=True)
    ]
    verdicts = rewards.grade(graded, sandbox)
    scores = score(items, verdicts)
    with run.output(step, {"scores": scores}) as output:
        Path(output, "scores.json").write_text(json.dumps(scores, indent=1))
        with open(Path(output, "samples.jsonl"), "w") as file:
            for item, completion, verdict in zip(items, completions, verdicts, strict=True):
                file.write(json.dumps(sample(item, completion, verdict)) + "\n")
    shown = "  ".join(f"{name} {value:.1f}" for name, value in scores["scores"].items())
    run.say(step, shown)


def _require_positions(folder: str, items: list[dict], settings: Evaluate) -> None:
    """Refuse tests that the model has no positions for, before an engine is started."""
    there = json.loads(Path(folder, "config.json").read_text()).get("max_position_embeddings")
    longest = max(len(item["prompt"]) for item in items)
    if there and longest + settings.max_tokens > there:
        raise UserError(
            f"evaluate.max_tokens is {settings.max_tokens} and the longest prompt has {longest} "
            f"tokens, but the model has positions for {there}: lower evaluate.max_tokens"
        )


def test_items(folder: str, category: str, uri: str, limit: int) -> list[dict[str, Any]]:
    """The prompts of one category as tokens, with how to grade them."""
    tokenizer = chat.load_tokenizer(folder)
    items = []
    for number, row in enumerate(formats.read_rows(uri, "prompts")):
        if limit and number == limit:
            break
        check(row, uri, number)
        items.append(
            {
                **{"category": category, "id": str(row.get("id", number))},
                **{"verifier": row["verifier"], "ground_truth": row.get("ground_truth")},
                "prompt": chat.prompt(tokenizer, row),
            }
        )
    if not items:
        raise UserError(f"{uri} has no test items for {category}")
    return items


def generate(model_uri: str, items: list[dict], settings: Evaluate) -> list[dict[str, Any]]:
    """One completion per item, in order."""
    longest = max(len(item["prompt"]) for item in items)
    prompts = ray.data.from_items(
        [{"place": place, "prompt": item["prompt"]} for place, item in enumerate(items)],
        override_num_blocks=settings.num_engines,
    )
    completed = prompts.map_batches(
        BatchEngine,
        fn_constructor_args=(model_uri, longest, settings.max_tokens, settings.temperature),
        batch_size=BATCH_PROMPTS,
        concurrency=settings.num_engines,
        num_cpus=settings.cpus_per_engine,
        num_gpus=settings.gpus_per_engine or None,
        resources=settings.resources,
    )
    return sorted(completed.iter_rows(), key=lambda row: row["place"])


def score(items: list[dict], verdicts: list[Verdict]) -> dict[str, Any]:
    """Percent by category, their unweighted mean as `overall`, and outcomes by category."""
    by_category: dict[str, list[Verdict]] = defaultdict(list)
    for item, verdict in zip(items, verdicts, strict=True):
        by_category[item["category"]].append(verdict)
    scores = {c: 100 * sum(v.score for v in vs) / len(vs) for c, vs in by_category.items()}
    scores["overall"] = sum(scores.values()) / len(scores)
    outcomes = {c: dict(Counter(v.outcome for v in vs)) for c, vs in by_category.items()}
    return {
        "scores": scores,
        "outcomes": outcomes,
        "items": {c: len(v) for c, v in by_category.items()},
    }


def sample(item: dict[str, Any], completion: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    return {
        **{"category": item["category"], "id": item["id"], "completion": completion["text"]},
        **{"score": verdict.score, "outcome": verdict.outcome, "tokens": int(completion["tokens"])},
    }
