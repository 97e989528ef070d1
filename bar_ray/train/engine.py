"""DeepSpeed behind four verbs: forward_backward, optim_step, save, weights.

With 8-bit states a worker trains alone, without it (`eight_bit`).

Training state is kept by tensor name as safetensors (weights, both Adam moments) with a JSON of
scalars. It does not depend on the number of workers or the ZeRO stage, and holds no pickle:
DeepSpeed's own shards do both.
"""

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import safe_open
from transformers import PreTrainedModel

from bar_ray.model import experts, freeze, tensors
from bar_ray.recipe import Stage
from bar_ray.train import eight_bit
from bar_ray.train.schedule import rate

# On a CPU DeepSpeed would compile a shared-memory collective for minutes; gloo is enough there.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

BETA1 = 0.9
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """One rank of a training run; torch.distributed must be up (Ray Train sees to that)."""

    def __init__(self, model: PreTrainedModel, stage: Stage, num_steps: int) -> None:
        self.stage, self.num_steps, self.step = stage, num_steps, 0
        self.updates = 0  # steps that were not skipped: what Adam counts
        groups = freeze.apply(model, stage.learn)
        if stage.run.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model
        self.world = torch.distributed.get_world_size()
        self._is_eight_bit = stage.optimizer == "adamw_8bit"
        groups = [{"params": g["params"], "scale": g["scale"], "lr": 0.0} for g in groups]
        settings = {"betas": (BETA1, stage.beta2), "weight_decay": stage.weight_decay}
        if self._is_eight_bit:
            self._plain = self._whole = True
            self.optimizer = eight_bit.adamw(groups, **settings)
            self.deepspeed = eight_bit.Alone(model, self.optimizer)
            self.device = self.deepspeed.device
            return
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
        bf16 = next(model.parameters()).dtype == torch.bfloat16
        self._plain = not bf16 and stage.run.zero_stage == 0  # DeepSpeed leaves our optimizer alone
        self._whole = stage.run.zero_stage < 3  # every rank holds every parameter
        # Only ZeRO 3 must know of parameters that a module uses without owning them.
        for block in () if self._whole else experts.moe_blocks(model):
            for row in block.gate.rows:  # a list's parameters are no module's own
                deepspeed.zero.register_external_parameter(block.gate, row)
            for weight in block.experts.parameters() if block.uses_kernels else ():
                deepspeed.zero.register_external_parameter(block, weight)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._config(bf16), dist_init_required=False
        )
        if self._plain and self.world == 1:
            # Gradients would be flattened, reduced over one rank and copied back: an eighth of the
            # time of a small model's step.
            self.deepspeed.enable_backward_allreduce = False
        self.device = self.deepspeed.device

    def _config(self, bf16: bool) -> dict[str, Any]:
        """The number of micro-batches varies, so accumulation is steered by hand (boundaries)."""
        # Stage 0 has no fp32 copies that checkpoints can reach; on one worker 1 is the same as 0.
        stage = max(1, self.stage.run.zero_stage) if bf16 else self.stage.run.zero_stage
        precise = {"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and stage == 2 else {}
        return {
            **precise,
            "train_micro_batch_size_per_gpu": self.stage.run.micro_batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0 if self._plain else self.stage.grad_clip,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            "steps_per_print": 10**12,
        }

    def forward_backward(
        self,
        batches: Iterable[Any],
        loss: Callable[[Any], tuple[torch.Tensor, dict[str, float]]],
    ) -> dict[str, float]:
        """Accumulate gradients over micro-batches; `loss` is already divided by global counts.

        Returns the metrics summed over micro-batches and ranks; of those ending in "_max", the
        largest.
        """
        batches, totals = list(batches), {}
        for index, batch in enumerate(batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(batches) - 1)
            value, metrics = loss(batch)
            self.deepspeed.backward(value * self.world)  # DeepSpeed averages over ranks
            for name, number in metrics.items():
                known = totals.get(name, 0.0)
                totals[name] = max(known, number) if name.endswith("_max") else known + number
        return self._over_ranks(totals)

    def _over_ranks(self, totals: dict[str, float]) -> dict[str, float]:
        if self.world == 1:
            return totals
        found = {}
        for kind in (torch.distributed.ReduceOp.SUM, torch.distributed.ReduceOp.MAX):
            is_max = kind == torch.distributed.ReduceOp.MAX
            names = sorted(name for name in totals if name.endswith("_max") == is_max)
            values = torch.tensor([totals[n] for n in names], dtype=torch.float32)
            values = values.to(self.device)
            torch.distributed.all_reduce(values, kind)
            found.update(zip(names, values.tolist(), strict=True))
        return found

    def optim_step(self, last: bool = True) -> dict[str, float]:
        """One AdamW update at the scheduled learning rate of each role.

        It ends the step, unless more updates are to follow in it (not `last`).
        """
        now = rate(self.step, self.num_steps, self.stage.schedule, self.stage.warmup)
        for group in self.optimizer.param_groups:
            rate_now = self.stage.lr * now * group["scale"]
            if self._is_eight_bit:  # compiled: a number would be part of the program
                group["lr"].fill_(rate_now)
            else:
                group["lr"] = rate_now
        norm = self._clip() if self._plain else None
        if self._is_eight_bit:
            torch.manual_seed(self.updates)  # rounds as before when the update is made again
        self.deepspeed.step()
        self.step += last
        self.updates += 1
        norm = self.deepspeed.get_global_grad_norm() if norm is None else norm
        return {"lr": self.stage.lr * now, "grad_norm": float(norm)}

    def _clip(self) -> torch.Tensor:
        """Clip gradients, equal on all ranks by now; returns their norm before.

        DeepSpeed would reduce the norm over the ranks once more, and not tell it.
        """
        learning = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in learning])
        if self.stage.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(learning, self.stage.grad_clip, norm)
        return norm

    def skip_step(self) -> None:
        """A step without gradients: only the count goes on."""
        self.step += 1

    # --- training state ---------------------------------------------------------------------------

    def save(self, folder: str | Path, state: dict[str, Any]) -> None:
        """Write weights and optimizer state of what learns; every rank calls, rank 0 writes.

        `state` is added to the JSON (data cursor and the like) and comes back from `load`.
        """
        self._link_moments()
        weights, moments = {}, {}
        first = torch.distributed.get_rank() == 0
        for name, parameter in freeze.trainable(self.model).items():
            weight = self._full_param(parameter)
            full = {moment: self._moment(parameter, moment) for moment in MOMENTS}
            if first:  # the others only take part in gathering
                weights[name] = weight
                for moment, parts in full.items():
                    moments |= {f"{name}.{moment}{end}": part for end, part in parts.items()}
        if first:
            tensors.save(Path(folder) / "weights.safetensors", weights)
            tensors.save(Path(folder) / "optimizer.safetensors", moments)
            (Path(folder) / "state.json").write_text(
                json.dumps({**state, "step": self.step, "updates": self.updates})
            )

    def load(self, folder: str | Path) -> dict[str, Any]:
        """Restore what `save` wrote, at any number of workers; returns its state."""
        state = json.loads((Path(folder) / "state.json").read_text())
        self.step, self.updates = state["step"], state.pop("updates")
        self._link_moments()
        with (
            safe_open(Path(folder) / "weights.safetensors", "pt") as weights,
            safe_open(Path(folder) / "optimizer.safetensors", "pt") as moments,
        ):
            there = {*moments.keys()}
            for name, parameter in freeze.trainable(self.model).items():
                self._set_param(parameter, weights.get_tensor(name))
                for moment in MOMENTS:
                    names = {end: f"{name}.{moment}{end}" for end in eight_bit.ENDINGS}
                    parts = {e: moments.get_tensor(n) for e, n in names.items() if n in there}
                    if parts:
                        self._set_moment(parameter, moment, parts)
        if self.updates or not self._is_eight_bit:
            self._set_adam_steps()
        return state

    def _full_param(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if self._plain:
            return parameter.detach().cpu().clone()
        return safe_get_full_fp32_param(parameter).cpu().clone()

    def _moment(self, parameter: torch.nn.Parameter, moment: str) -> eight_bit.Parts:
        if self._plain:
            moments = self.optimizer.state[parameter]  # empty before the first update
            if self._is_eight_bit and not moments:
                return {}
            parts = eight_bit.parts_of(moments.get(moment, torch.zeros_like(parameter)))
        else:
            parts = {"": safe_get_full_optimizer_state(parameter, moment)}
        return {end: part.detach().cpu().clone() for end, part in parts.items()}

    def _set_param(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        with self._gathered(parameter, changed=True):
            parameter.data.copy_(value)
        if not self._whole:
            safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
        elif not self._plain:
            safe_set_full_fp32_param(parameter, value.to(self.device))

    def _set_moment(
        self, parameter: torch.nn.Parameter, moment: str, parts: eight_bit.Parts
    ) -> None:
        if self._plain:
            known = eight_bit.moment_of(parts, parameter, moment == "exp_avg")
            self.optimizer.state[parameter][moment] = known
        elif self._whole:
            safe_set_full_optimizer_state(parameter, parts[""].to(self.device), moment)
        else:
            part = self._own_part(parameter, parts[""])
            safe_set_local_optimizer_state(parameter, part, moment)

    def _own_part(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor under ZeRO 3.

        The last part is padded, which DeepSpeed's setters of whole tensors do not know.
        """
        size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
        padded = F.pad(value.flatten().to(self.device), (0, size * self.world - value.numel()))
        return padded[rank * size : (rank + 1) * size]

    def _link_moments(self) -> None:
        """Make every moment reachable by its parameter under ZeRO, before the first step too.

        ZeRO 1 and 2 link them once, after the first step of the first group only, so with several
        groups (one per role) the others would stay unknown.
        """
        if self._plain:
            return
        for partition in self._partitions():
            state = self.optimizer.optimizer.state[partition]
            state.setdefault("step", self._count(0))
            for moment in MOMENTS:
                state.setdefault(moment, torch.zeros_like(partition))
        if self._whole:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[torch.Tensor]:
        """What this rank updates of each group under ZeRO, in fp32."""
        zero = self.optimizer
        return (
            zero.single_partition_of_fp32_groups
            if self._whole
            else zero.fp32_partitioned_groups_flat
        )

    def _set_adam_steps(self) -> None:
        if self._plain:
            states = [self.optimizer.state[p] for p in freeze.trainable(self.model).values()]
        else:
            states = [self.optimizer.optimizer.state[p] for p in self._partitions()]
        for state in states:
            state["step"] = self._count(self.updates)

    def _count(self, updates: int) -> torch.Tensor:
        """Fused Adam keeps its step count beside the parameters, the 8-bit one on the host."""
        return torch.tensor(float(updates), device="cpu" if self._is_eight_bit else self.device)

    def weights(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name on disk, in host memory: every rank calls, rank 0 gets them."""
        named = {}
        for name, parameter in self.model.named_parameters():
            with self._gathered(parameter):
                if torch.distributed.get_rank() == 0:
                    held = parameter.detach().cpu()
                    named[name] = held if self._whole else held.clone()
        return experts.stack_routers(named)

    def _gathered(self, parameter: torch.nn.Parameter, changed: bool = False) -> Any:
        """The whole parameter inside a `with`; under ZeRO 3 a rank holds a part of it."""
        if self._whole:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameter, modifier_rank=0 if changed else None)
