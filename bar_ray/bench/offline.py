"""Plain vLLM, offline: `python -m bar_ray.bench.offline job.json` prints its figures as JSON."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from bar_ray.rollout.launch import EngineOptions, engine_arguments, fitted, import_vllm


def main(job: dict[str, Any]) -> dict[str, float]:
    """Generate every batch; the first one warms up and does not count."""
    options = fitted(EngineOptions(**job["options"]), job["model"])
    import_vllm(options)
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_arguments(job["model"], options))
    params = SamplingParams(
        n=job["n"],
        temperature=job["temperature"],
        max_tokens=job["max_tokens"],
        stop_token_ids=job["stop_token_ids"],
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )
    seconds, lengths = 0.0, []
    for number, batch in enumerate(job["batches"]):
        prompts = [{"prompt_token_ids": tokens} for tokens in batch]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        if number:
            seconds += time.perf_counter() - started
            lengths += [len(o.token_ids) for output in outputs for o in output.outputs]
    return {
        "tokens_per_s": sum(lengths) / seconds,
        "length": sum(lengths) / len(lengths),
        "completions": len(lengths),
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
