"""Evaluation: one engine for several checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.actor import ActorHandle

from bar_ray.model import branch
from bar_ray.model.tensors import Checkpoint
from bar_ray.rollout.batch import BatchEngine
from bar_ray.tiny.model import tiny_config, tiny_generation_config
from bar_ray.tiny.tokenizer import build_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two dense models of one shape, far enough from their initialisation to differ."""
    from transformers import AutoModelForCausalLM

    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        folder = tmp_path_factory.mktemp("dense")
        for part in (model, tiny_generation_config(), build_tokenizer()):
            part.save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def moe(dense: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("moe") for _ in dense]
    one, two = map(Checkpoint, dense)
    branch.branch(one, two, str(folders[0]), std=0.3, seed=0)
    branch.branch(two, one, str(folders[1]), std=0.3, seed=1)
    return folders


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_an_engine_answers_as_each_checkpoint_in_turn(
    cluster: None, kind: str, request: pytest.FixtureRequest
) -> None:
    first, second = map(str, request.getfixturevalue(kind))
    engines = {place: ray.remote(BatchEngine).remote(place, 5, 8, 0.0) for place in (first, second)}
    as_started = {place: answers(engine, place) for place, engine in engines.items()}
    assert as_started[first] != as_started[second]
    in_turn = answers(engines[first], second, first)
    assert in_turn == as_started[second] + as_started[first]
    for engine in engines.values():
        ray.kill(engine)


def answers(engine: ActorHandle, *models: str) -> list[str]:
    """Greedy completions of the same prompts, model after model."""
    prompts = [[5 + n, 9, 11, 7 + n, 6] for n in range(12)]
    rows = [(model, prompt) for model in models for prompt in prompts]
    batch: dict[str, Any] = {
        "test": np.zeros(len(rows)),
        "place": np.arange(len(rows)),
        "model": np.array([model for model, _ in rows]),
        "prompt": [prompt for _, prompt in rows],
    }
    return ray.get(engine.__call__.remote(batch), timeout=180)["text"]
