"""TRL's GRPOTrainer on the same task: `python -m bar_ray.bench.trl_peer job.json`.

The model is loaded as our learner loads it, so that the same tensors learn at the same rates (the
anchor does not), and graded by the same rewards. Generation is transformers', TRL's default: its
vLLM modes need a GPU.
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bar_ray import rewards
from bar_ray.data import chat
from bar_ray.model import experts, freeze
from bar_ray.recipe import Learn, Sandbox


def main(job: dict[str, Any]) -> dict[str, list[float]]:
    """Train, save the model to `output`, return rewards and seconds by step."""
    torch.set_num_threads(job["threads"])
    from datasets import Dataset
    from transformers import GenerationConfig, TrainerCallback
    from trl import GRPOTrainer

    stage = job["stage"]
    tokenizer = chat.load_tokenizer(job["model"])
    model = experts.load(job["model"], torch.float32, 0)
    model.generation_config = GenerationConfig.from_pretrained(job["model"])  # where a turn ends
    groups = freeze.apply(model, Learn(**stage["learn"]))
    optimizer = torch.optim.AdamW(
        [{"params": g["params"], "lr": stage["lr"] * g["scale"]} for g in groups],
        betas=(0.9, stage["beta2"]),
        weight_decay=stage["weight_decay"],
    )
    sandbox = rewards.sandbox_for(Sandbox(**job["sandbox"]))
    times, lengths = [time.perf_counter()], []

    def reward(completion_ids: list, ground_truth: list, verifier: list, **_: Any) -> list[float]:
        texts = [chat.completion_text(tokenizer, ids) for ids in completion_ids]
        truths = [json.loads(each) for each in ground_truth]
        lengths.extend(len(ids) for ids in completion_ids)
        verdicts = rewards.grade(list(zip(texts, truths, verifier, strict=True)), sandbox)
        return [verdict.score for verdict in verdicts]

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())
            print(f"trl step {len(times) - 1}", file=sys.stderr, flush=True)

    rows = Dataset.from_list(
        [
            {
                "prompt": row["messages"],
                "ground_truth": json.dumps(row.get("ground_truth")),
                "verifier": row["verifier"],
            }
            for row in job["rows"]
        ]
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments(job),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[Clock()],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    trainer.train()
    experts.save(model, job["output"], job["model"])
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return {"rewards": logged, "step_seconds": seconds, "lengths": lengths}


def arguments(job: dict[str, Any]) -> Any:
    """GRPOConfig with the settings of the stage."""
    from trl import GRPOConfig

    stage = job["stage"]
    grpo, rollout = stage["grpo"], stage["rollout"]
    return GRPOConfig(
        output_dir=job["output"],
        use_cpu=True,
        bf16=False,
        seed=job["seed"],
        max_steps=stage["steps"],
        per_device_train_batch_size=stage["batch_size"] * grpo["samples"],
        num_generations=grpo["samples"],
        max_completion_length=rollout["max_tokens"],
        temperature=rollout["temperature"],
        learning_rate=stage["lr"],
        lr_scheduler_type=stage["schedule"],
        weight_decay=stage["weight_decay"],
        max_grad_norm=stage["grad_clip"],
        beta=grpo["kl"],
        epsilon=grpo["clip_low"],
        epsilon_high=grpo["clip_high"],
        loss_type="dapo",  # the mean over all tokens of the batch
        scale_rewards="none",  # centred advantages
        router_aux_loss_coef=0.0,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps(answer))
