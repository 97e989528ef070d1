"""Branch: a two-expert MoE from two dense checkpoints (BAR, section "Branch").

The post-trained dense model gives the anchor FFN (expert 0) and every shared weight; the pretrained
one gives the FFN that the expert (expert 1) starts from. The new router is small normal noise: with
both FFNs equal and k = E any router reproduces the dense model, because the gates sum to one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bar_ray import families
from bar_ray.families import Family
from bar_ray.model import tensors
from bar_ray.model.tensors import Checkpoint, Spec
from bar_ray.types import UserError


def run(step, run) -> None:
    """The `branch` verb: inputs `post_trained` and `pretrained`, output their family's mixture."""
    post = Checkpoint(run.fetch(step.inputs["post_trained"]))
    pre = Checkpoint(run.fetch(step.inputs["pretrained"]))
    with run.output(step) as folder:
        branch(post, pre, folder, step.settings["router_std"], step.settings["seed"])


def branch(post: Checkpoint, pre: Checkpoint, folder: str, std: float, seed: int) -> None:
    """Write the two-expert model to `folder`; shapes must agree, embeddings must be untied."""
    if not (Path(post.folder) / "tokenizer_config.json").exists():
        raise UserError(f"{post.folder} has no tokenizer; the post-trained checkpoint needs one")
    upcycle([post, pre], post.__getitem__, folder, std, seed)


def upcycle(
    models: Sequence[Checkpoint],
    shared: Callable[[str], torch.Tensor],
    folder: str,
    std: float,
    seed: int,
) -> None:
    """Write the MoE whose experts are the FFNs of dense models, byte for byte.

    Args:
        models: one family; the first gives config and tokenizer.
        shared: every other tensor by name.
        std, seed: of the new router.
    """
    family = _check(models)
    first = models[0]
    num_layers, width = first.config["num_hidden_layers"], first.config["hidden_size"]
    specs: dict[str, Spec] = {}
    sources: dict[str, tuple[Checkpoint, str]] = {}
    for name in first.names:
        if ".mlp." not in name:
            specs[name] = first.spec(name)
            continue
        for expert, dense in enumerate(models):
            stacked = name.replace(".mlp.", f".mlp.experts.{expert}.")
            sources[stacked], specs[stacked] = (dense, name), first.spec(name)
    dtype = next(iter(specs.values())).dtype
    routers = _routers(num_layers, len(models), width, std, seed)
    specs.update({name: Spec(dtype, (len(models), width)) for name in routers})

    def tensor(name: str) -> torch.Tensor:
        if name in routers:
            return routers[name]
        if name in sources:
            dense, dense_name = sources[name]
            return dense[dense_name]
        return shared(name)

    config = moe_config(family, first.config, len(models))
    tensors.write(folder, config, specs, tensor, side_files=first.folder)


def _routers(
    num_layers: int, num_experts: int, width: int, std: float, seed: int
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(num_layers)]
    return {name: torch.randn(num_experts, width, generator=generator) * std for name in names}


def moe_config(family: Family, dense: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
    """The mixture's config from a dense one, which the dense class reads first.

    RoPE's parameters are among what is copied: defaults differ, and a wrong theta is silent.
    """
    from transformers import AutoConfig

    given = {name: value for name, value in dense.items() if name != "model_type"}
    parsed = AutoConfig.for_model(family.dense, **given).to_dict()
    fields = {*AutoConfig.for_model(family.moe).to_dict(), *family.kept}
    fields -= {"model_type", "architectures", "transformers_version"}
    values = {name: value for name, value in parsed.items() if name in fields}
    values |= {family.width: parsed["intermediate_size"], **family.fixed}
    values |= {family.count: num_experts, "num_experts_per_tok": num_experts}
    config = AutoConfig.for_model(family.moe, **values)
    config.architectures = [family.moe_class]
    return family.written(json.loads(config.to_json_string(use_diff=False)))


def _check(models: Sequence[Checkpoint]) -> Family:
    """The family of the dense models, which must be one."""
    first = models[0]
    family = families.of_dense(first.config, str(first.folder))
    for dense in models:
        family.refuse(dense.config, str(dense.folder))
        if dense.config.get("tie_word_embeddings"):
            raise UserError(f"{dense.folder} ties its embeddings to its LM head; untie them first")
        if missing := set(first.names) ^ set(dense.names):
            raise UserError(
                f"{first.folder} and {dense.folder} do not hold the same tensors "
                f"(such as {sorted(missing)[0]}); both must be of one family"
            )
        tensors.same_specs(first, dense, first.names)
    return family
