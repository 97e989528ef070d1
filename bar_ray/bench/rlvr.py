"""RLVR measured: asynchronous against synchronous, the engines against plain vLLM, all against TRL.

Every side starts from the same checkpoint and sees the same number of samples of the same prompts,
with as many threads in total. Steps per minute leave the first step out: it warms things up.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bar_ray import pipeline, report, storage
from bar_ray.cluster import session
from bar_ray.cluster.run import Run
from bar_ray.data import chat, formats
from bar_ray.graph import Step
from bar_ray.recipe import Evaluate, Recipe, Rlvr
from bar_ray.report import history
from bar_ray.rollout.sampler import engine_options
from bar_ray.rollout.source import kept_name
from bar_ray.types import UserError

LAST = 5  # steps whose rewards are averaged
Record = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """One expert's RLVR stage, set up to be measured in a storage of its own."""

    recipe: Recipe
    domain: str
    staleness: int
    root: str  # where results go

    @property
    def stage(self) -> Rlvr:
        stage = self.recipe.experts[self.domain].rlvr
        if stage is None:
            raise UserError(f"experts.{self.domain} has no `rlvr` stage to measure")
        return stage

    @property
    def model(self) -> Step:
        """The step whose model enters RLVR."""
        return self.rlvr(0).inputs["model"]

    def rlvr(self, staleness: int) -> Step:
        """The stage with its own storage, keeping its rollouts; its inputs stay where they are."""
        step = pipeline.build(self.recipe).stages[self.domain]["rlvr"]
        rollout = replace(self.stage.rollout, dump_every=1)
        stage = replace(self.stage, max_staleness=staleness, rollout=rollout)
        place = storage.join(self.root, f"staleness-{staleness}")
        return replace(step, settings={**step.settings, "stage": stage}, storage_uri=place)


def run(bench: Bench) -> Record:
    """All of it; prints as it goes and returns every figure."""
    session.drive(bench.recipe, [bench.model])
    sides, scores = {}, {}
    for name, staleness in (("synchronous", 0), ("asynchronous", bench.staleness)):
        print(f"--- {name}: max_staleness {staleness}", flush=True)
        step = bench.rlvr(staleness)
        session.drive(replace(bench.recipe, storage=step.storage_uri), [step])
        rows = history.read(step.storage_uri, [step], "").metrics[history.identity(step)]
        sides[name] = _side(rows, bench.stage)
        scores[name] = step.artifact.uri
    print("--- plain vLLM, offline, the prompts of the synchronous run", flush=True)
    offline = _peer("offline", _offline_job(bench))
    print("--- TRL GRPOTrainer", flush=True)
    sides["trl"], scores["trl"] = _trl(bench)
    for name, uri in scores.items():
        sides[name]["test"] = _score(bench, uri)
    sides["before"] = {"test": _score(bench, bench.model.artifact.uri)}
    sync = sides["synchronous"]
    results = {
        "settings": {**asdict(bench.stage), "expert": bench.domain, "staleness": bench.staleness},
        "sides": sides,
        "offline": offline,
        "async_over_sync": sides["asynchronous"]["steps_per_min"] / sync["steps_per_min"],
        "engine_over_vllm": sync["rollout_tokens_per_s"] / offline["tokens_per_s"],
        "sync_over_trl": sync["samples_per_s"] / sides["trl"]["samples_per_s"],
        "async_over_trl": sides["asynchronous"]["samples_per_s"] / sides["trl"]["samples_per_s"],
    }
    storage.write_json(storage.join(bench.root, "rlvr.json"), results)
    return results


def _side(rows: list[Record], stage: Rlvr) -> Record:
    """The figures of one run of the stage, from its metrics."""
    minutes = (rows[-1]["time"] - rows[0]["time"]) / 60
    later = rows[1:]
    steps_per_min = len(later) / minutes

    def mean(name: str) -> float:
        return fmean(row[name] for row in later if name in row)

    tokens = sum(row["rollout_tokens"] for row in later)
    return {
        "steps": len(rows),
        "steps_per_min": steps_per_min,
        "samples_per_s": steps_per_min / 60 * stage.batch_size * stage.grpo.samples,
        "reward_first": fmean(row["reward"] for row in rows[:LAST]),
        "reward_last": fmean(row["reward"] for row in rows[-LAST:]),
        "learner_waits": sum(r["rollout_wait_s"] for r in later) / sum(r["seconds"] for r in later),
        "engines_idle": mean("engines_idle"),
        "rollout_tokens_per_s": tokens / sum(row["generate_s"] for row in later),
        "length": mean("length"),
        "staleness": mean("staleness"),
        "staleness_max": max(row["staleness_max"] for row in rows),
        "requeued": rows[-1]["requeued"],
        "sync_s": mean("sync_s"),
        "sync_mb": mean("sync_mb"),
        "canary_gap": max(row.get("canary_gap", 0.0) for row in rows),
        "importance_max": max(row.get("importance_max", 0.0) for row in rows),
    }


def _offline_job(bench: Bench) -> Record:
    """The same prompts in the same batches for vLLM alone, with the same engine settings."""
    step = bench.rlvr(0)
    files = storage.list_files(storage.join(step.storage_uri, "runs"), recursive=True)
    kept = {Path(uri).name: uri for uri in files if "/rollouts/" in uri}
    batches = []
    for number in range(len(kept)):
        lines = storage.read_bytes(kept[kept_name(number)]).splitlines()
        batches.append([json.loads(line)["prompt"] for line in lines])
    model = storage.fetch(bench.model.artifact.uri)
    rollout = bench.stage.rollout
    return {
        "model": model,
        "options": asdict(engine_options(step)),
        "batches": batches,
        "n": bench.stage.grpo.samples,
        "temperature": rollout.temperature,
        "max_tokens": rollout.max_tokens,
        "stop_token_ids": chat.stop_ids(chat.load_tokenizer(model)),
    }


def _trl(bench: Bench) -> tuple[Record, str]:
    """TRL's figures, and the folder of the model it ends with."""
    stage, out = bench.stage, storage.join(bench.root, "trl", "model")
    step = bench.rlvr(0)
    job = {
        "model": storage.fetch(bench.model.artifact.uri),
        "rows": [
            row
            for name in stage.data
            for row in formats.read_rows(Run.locate(step, name), "prompts")
        ],
        "stage": asdict(stage),
        "sandbox": asdict(bench.recipe.sandbox),
        "seed": bench.recipe.seed,
        "threads": stage.run.threads * stage.run.num_workers + stage.rollout.threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "model"))
        found = _peer("trl_peer", {**job, "output": output})
        storage.commit(output, out, {"trained_by": "trl"})
    seconds, rewards = found["step_seconds"][1:], found["rewards"]
    each = fmean(seconds)
    return {
        "steps": len(rewards),
        "steps_per_min": 60 / each,
        "samples_per_s": stage.batch_size * stage.grpo.samples / each,
        "reward_first": fmean(rewards[:LAST]),
        "reward_last": fmean(rewards[-LAST:]),
        "length": fmean(found["lengths"]),
    }, out


def _score(bench: Bench, uri: str) -> float:
    """Greedy score on the domain's test set."""
    categories = {bench.domain: bench.recipe.evaluate.categories[bench.domain]}
    settings: Evaluate = replace(bench.recipe.evaluate, categories=categories)
    recipe = replace(bench.recipe, evaluate=settings)
    step = pipeline.evaluate_folder(recipe, uri)
    session.drive(recipe, [step])
    return report.collect({"model": step})["models"]["model"][bench.domain]


def _peer(module: str, job: Record) -> Record:
    """Run a peer in a process of its own; its last line is its answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [sys.executable, "-m", f"bar_ray.bench.{module}", file.name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{module} ended with exit code {done.returncode}: see above")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: Record) -> str:
    """The figures for a reader."""
    sides = results["sides"]
    names = ("synchronous", "asynchronous", "trl")
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("steps per minute", "steps_per_min", "{:.2f}".format),
        ("samples per second", "samples_per_s", "{:.1f}".format),
        (f"reward, first {LAST} steps", "reward_first", "{:.3f}".format),
        (f"reward, last {LAST} steps", "reward_last", "{:.3f}".format),
        ("test score", "test", "{:.1f}".format),
        ("completion length, tokens", "length", "{:.1f}".format),
        ("learner waits, share of the time", "learner_waits", "{:.2f}".format),
        ("engines idle, share of the time", "engines_idle", "{:.2f}".format),
        ("staleness, mean", "staleness", "{:.2f}".format),
        ("staleness, most", "staleness_max", "{:.0f}".format),
        ("prompts sampled again", "requeued", "{:.0f}".format),
        ("weight sync, s", "sync_s", "{:.3f}".format),
        ("weight sync, MB", "sync_mb", "{:.2f}".format),
        ("largest canary gap", "canary_gap", "{:.1e}".format),
        ("largest importance weight", "importance_max", "{:.2f}".format),
    ]
    lines = [f"{'':<34}" + "".join(f"{name:>14}" for name in names)]
    for label, key, shown in rows:
        cells = [shown(sides[n][key]) if key in sides[n] else "-" for n in names]
        lines.append(f"{label:<34}" + "".join(f"{cell:>14}" for cell in cells))
    offline, sync = results["offline"], sides["synchronous"]
    lines += [
        "",
        f"test score before RLVR: {sides['before']['test']:.1f}",
        f"asynchronous over synchronous, steps per minute: {results['async_over_sync']:.2f}",
        f"rollouts while generating: {sync['rollout_tokens_per_s']:.0f} tokens/s; plain vLLM "
        f"{offline['tokens_per_s']:.0f} ({offline['length']:.1f} tokens a completion): "
        f"{results['engine_over_vllm']:.2f}",
        f"samples per second over TRL: synchronous {results['sync_over_trl']:.2f}, "
        f"asynchronous {results['async_over_trl']:.2f}",
    ]
    return "\n".join(lines)
