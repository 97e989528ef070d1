"""Offline generation: one vLLM engine per Ray Data worker, for evaluation."""

from typing import Any

from bar_ray.data import chat
from bar_ray.rollout.launch import EngineOptions, local_folder, prepare_environment

KV_CACHE_BYTES = 256 * 2**20


class BatchEngine:
    """A Ray Data worker: prompts as tokens in, completions as text and length out."""

    def __init__(self, place: str, longest: int, max_tokens: int, temperature: float) -> None:
        import torch

        on_gpu = torch.cuda.is_available()
        folder = local_folder(place)
        options = EngineOptions(max_model_len=longest + max_tokens, enforce_eager=not on_gpu)
        prepare_environment(options)
        from vllm import LLM, SamplingParams

        self.tokenizer = chat.load_tokenizer(folder)
        self.llm = LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype="auto" if on_gpu else options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            enforce_eager=not on_gpu,
            kv_cache_memory_bytes=None if on_gpu else KV_CACHE_BYTES,
            disable_log_stats=True,
        )
        self.params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            stop_token_ids=chat.stop_ids(self.tokenizer),
            detokenize=False,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prompts = [{"prompt_token_ids": [int(t) for t in ids]} for ids in batch["prompt"]]
        outputs = self.llm.generate(prompts, self.params, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        text = [chat.completion_text(self.tokenizer, ids) for ids in tokens]
        return {"place": batch["place"], "text": text, "tokens": [len(ids) for ids in tokens]}
