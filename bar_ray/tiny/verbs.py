"""The two verbs of the tiny world: write its data, and make the untrained dense model."""

from pathlib import Path
from typing import Any

from bar_ray.tiny.model import tiny_config, tiny_generation_config
from bar_ray.tiny.tokenizer import build_tokenizer
from bar_ray.tiny.world import write_world


def world(step: Any, run: Any) -> None:
    """Every data file of the world, from a seed."""
    with run.output(step) as folder:
        write_world(folder, step.settings["seed"])


def init(step: Any, run: Any) -> None:
    """A dense model with random weights and the world's tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(step.settings["seed"])
    config = tiny_config(step.settings.get("family", "olmo2"))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with run.output(step) as folder:
        model.save_pretrained(folder)
        tiny_generation_config().save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        Path(folder, "README.md").unlink(missing_ok=True)
