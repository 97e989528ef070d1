"""RLVR: vLLM engines in their own actors and placement groups, learners in another.

    for each step:  a batch of graded groups         (sampler, engines, graders)
                    one or more optimizer updates    (learners: Ray Train + DeepSpeed)
                    push the new weights, compare log-probabilities (canary)

With `max_staleness` 0 every completion comes from the newest weights; above it, engines go on
generating while the learner steps and take new weights in between. Weights are pushed before the
first prompt, also on resume. A checkpoint holds weights, optimizer, the prompts consumed so far,
where the line of prompts stands, and the groups that wait.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bar_ray.graph import Step
from bar_ray.rollout.calls import LOST, ask
from bar_ray.rollout.sampler import SamplerActor
from bar_ray.stages import start

CLOSE_S = 60.0
LEARNER = "bar_ray.stages.learner:Learner"


def run(step: Step, run: Any) -> None:
    """Inputs: `model`; data: prompts by source; settings: stage, seed."""
    if step.settings["stage"].replay:
        start.train(LEARNER, [step], run, sampler=None)
        return
    with sampling(step, run) as sampler:
        start.train(LEARNER, [step], run, sampler=sampler)


@contextlib.contextmanager
def sampling(step: Step, run: Any) -> Iterator[Any]:
    """The sampler of a step, opening; gone with all it started on every way out."""
    here = NodeAffinitySchedulingStrategy(run.head, soft=False)
    options = {
        "scheduling_strategy": here,
        "max_restarts": step.settings["stage"].rollout.max_failures,
    }
    sampler = ray.remote(SamplerActor).options(num_cpus=0, **options).remote(step, run)
    sampler.open.remote()  # engines start while the learners do
    try:
        yield sampler
    finally:
        with contextlib.suppress(*LOST, ray.exceptions.RayError):
            ask(sampler.close.remote(), CLOSE_S, "the sampler")
        ray.kill(sampler)
