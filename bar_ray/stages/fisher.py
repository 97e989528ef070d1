"""The `fisher` verb: how much each shared weight of an expert matters to its own SFT data.

The diagonal of the empirical Fisher information, estimated as the mean squared gradient of a packed
row's mean loss (Matena and Raffel 2022): weights that a merge by Fisher takes from each expert.
"""

import json
from pathlib import Path
from typing import Any

import torch

from bar_ray.model import fused, tensors
from bar_ray.recipe import SHARED
from bar_ray.stages import lm


class FisherWorker(lm.LmWorker):
    """Gradients of one row after the other; nothing is learned. One worker, no checkpoints.

    Inputs: `model`, a `data:NAME` per source; settings: stage (rows as steps), shares, seed.
    """

    def loop(self) -> dict[str, Any]:
        from bar_ray.train.loss import language_model_loss

        folder = self.run.fetch(self.step.inputs["model"])
        rows = self.prepare()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = fused.load(folder, getattr(torch, self.stage.dtype)).to(device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(tensors.role_of(name) in SHARED)
        shared = {n: p for n, p in model.named_parameters() if p.requires_grad}
        total = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in shared.items()}
        for row in range(rows):
            batch = self.batches(row, 0, 1)
            counts = batch.loss_tokens, batch.tokens
            for micro in batch.micro:
                language_model_loss(model, micro.to(device), *counts, 0.0)[0].backward()
            for name, parameter in shared.items():
                total[name] += parameter.grad.float().square() / rows
                parameter.grad = None
        with self.run.output(self.step, {"rows": rows}) as output:
            tensors.save(Path(output, "model.safetensors"), {n: t.cpu() for n, t in total.items()})
            Path(output, "config.json").write_text(json.dumps({"model_type": "fisher"}))
        return {"rows": rows}
