"""The `rollouts` verb: what a model answers to its RLVR prompts, graded, without learning from it.

The rollout half alone, with a learner that learns nothing: to look at prompts, verifiers and
rewards before a stage is paid for, to measure sampling, or to give a learner something to replay.
"""

import json
from pathlib import Path
from typing import Any

from bar_ray.data import chat
from bar_ray.graph import Step
from bar_ray.rollout import transcripts
from bar_ray.rollout.records import Group
from bar_ray.rollout.source import LiveRollouts, kept_name
from bar_ray.stages.rlvr import sampling


def run(step: Step, run: Any) -> None:
    """Inputs: `model`; data: prompts by source; settings: stage, seed, steps.

    Output: the groups of each step as JSONL, and all of them as a page.
    """
    tokenizer = chat.load_tokenizer(run.fetch(step.inputs["model"]))
    with sampling(step, run) as sampler, run.output(step) as folder:
        rollouts = LiveRollouts(sampler, step.settings["stage"])
        num_steps = min(rollouts.open(), step.settings["steps"])
        groups: list[Group] = []
        for number in range(num_steps):
            rollouts.push(number, [])
            batch = rollouts.batch(number)
            Path(folder, kept_name(number)).write_text(
                "".join(json.dumps(group.to_json()) + "\n" for group in batch.drawn)
            )
            groups += batch.drawn
            shown = "  ".join(f"{k} {v:.3g}" for k, v in batch.metrics.items() if "/" not in k)
            run.say(step, f"{number + 1}/{num_steps}  {shown}")
        html = transcripts.page(f"Rollouts of {step.name}", groups, tokenizer.decode)
        Path(folder, "transcripts.html").write_text(html)
