"""Offline generation: one vLLM engine per Ray Data worker, for evaluation."""

import itertools
from typing import Any

from bar_ray.data import chat
from bar_ray.rollout.launch import (
    engine_arguments,
    import_vllm,
    local_folder,
    offline_options,
)
from bar_ray.rollout.weights import shared_files


class BatchEngine:
    """A Ray Data worker: prompts as tokens in, completions as text and length out.

    A row's `model` is the checkpoint that answers it, of the shape of the one given at the start.
    """

    def __init__(self, place: str, longest: int, max_tokens: int, temperature: float) -> None:
        folder, self.place = local_folder(place), place
        options = offline_options(longest + max_tokens)
        import_vllm(options)
        from vllm import LLM, SamplingParams

        self.tokenizer, self.shm_dir = chat.load_tokenizer(folder), options.shm_dir
        self.ends = chat.special_ids(self.tokenizer)
        self.llm = LLM(**engine_arguments(folder, options))
        self.params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            stop_token_ids=self.ends,
            detokenize=False,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        tokens: list[list[int]] = []
        rows = zip(batch["model"], batch["prompt"], strict=True)
        for place, same in itertools.groupby(rows, key=lambda row: str(row[0])):
            self._become(place)
            prompts = [{"prompt_token_ids": [int(t) for t in ids]} for _, ids in same]
            outputs = self.llm.generate(prompts, self.params, use_tqdm=False)
            tokens += [list(output.outputs[0].token_ids) for output in outputs]
        said = [[token for token in ids if token not in self.ends] for ids in tokens]
        text = [chat.completion_text(self.tokenizer, ids) for ids in said]
        kept = {name: batch[name] for name in ("test", "place")}
        return {**kept, "text": text, "tokens": [len(ids) for ids in tokens]}

    def _become(self, place: str) -> None:
        """Take the weights of another checkpoint, as RLVR's engines do."""
        if place == self.place:
            return
        with shared_files(local_folder(place), self.shm_dir) as paths:
            self.llm.start_weight_update()
            self.llm.update_weights({"update_info": {"paths": paths}})
            self.llm.finish_weight_update()
        self.llm.reset_prefix_cache()
        self.llm.collective_rpc("zero_kv_cache")  # a NaN in it would outlive its weights
        self.place = place
