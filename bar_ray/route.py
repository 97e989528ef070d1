"""Route: train only the router of the merged model, and measure where it sends each source.

Ordinary SFT cross-entropy on the stratified sample; everything but the router rows is frozen. The
load of every expert is measured at the end on the sample: mean gate by source, layer and expert.
"""

import json
from pathlib import Path
from typing import Any

import torch

from bar_ray.graph import inputs_of
from bar_ray.stages import lm

LOAD_ROWS = 32


class RouteWorker(lm.LmWorker):
    """A language-model stage whose artifact also holds the router's load.

    Inputs: `model` (merged), a `data:NAME` per source; settings: stage, shares, top_k, seed.
    """

    def finish_output(self, folder: str) -> None:
        names = inputs_of(self.step, "data")
        load = {
            name: router_load(self.engine.model, shard)
            for name, shard in zip(names, self.batches.shards, strict=True)
        }
        Path(folder, "router_load.json").write_text(json.dumps(load))


@torch.no_grad()
def router_load(model: Any, shard: Any) -> list[list[float]]:
    """Mean gate over a source's loss tokens, [layer][expert]."""
    from bar_ray.model.experts import moe_blocks, router_logits

    device = next(model.parameters()).device
    totals = [0.0] * len(moe_blocks(model))
    count = 0
    for row in range(min(LOAD_ROWS, len(shard))):
        tokens = torch.from_numpy(shard.tokens[row].astype("int64"))[None].to(device)
        positions = torch.from_numpy(shard.positions[row].astype("int64"))[None].to(device)
        wanted = torch.from_numpy(shard.loss[row].astype("bool")).to(device)
        with router_logits(model) as blocks:
            model.model(input_ids=tokens, position_ids=positions, use_cache=False)
            for layer, block in enumerate(blocks):
                totals[layer] += block.gates(block.logits)[wanted].sum(0).cpu()
        count += int(wanted.sum())
    return [(total / count).tolist() for total in totals]
