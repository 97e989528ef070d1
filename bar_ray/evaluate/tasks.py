"""Tests as task files of lm-evaluation-harness, beside an exported model.

    cd MODEL/lm_eval && lm-eval run --include_path . --tasks bar ...

Stock `lm-eval` (0.4.13) reruns them and agrees item by item. It knows no tools and no mask, so
prompts are rendered here and given as text, with no template applied there (`add_bos_token=False`
keeps the tokenizer from adding to them); answers end at any special token, as ours do, because
some of its backends drop these from the text before it is cut.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bar_ray.categories import plain
from bar_ray.data import chat
from bar_ray.recipe import Evaluate

FOLDER, GROUP = "lm_eval", "bar"
TASK = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}  # beside this file: run lm-eval in this folder
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: ground_truth
num_fewshot: 0
generation_kwargs: {generation}
filter_list:
  - name: graded
    filter: [{{function: custom, filter_fn: !function bar_ray.evaluate.grading.grade_all}}]
process_results: !function bar_ray.evaluate.grading.score
metric_list: [{{metric: score, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
ALL = """\
group: {group}
task: {tasks}
aggregate_metric_list: [{{metric: score, filter_list: graded, weight_by_size: false}}]
metadata: {{version: 1.0}}
"""


def write(
    folder: Path, model: str | Path, items: Sequence[dict[str, Any]], settings: Evaluate
) -> None:
    """One task per category, and the group of all whose score is their unweighted mean."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = chat.load_tokenizer(model)
    ends = tokenizer.convert_ids_to_tokens(chat.special_ids(tokenizer))
    generation = {"until": ends, "max_gen_toks": settings.max_tokens, "do_sample": False}
    if settings.temperature:
        generation |= {"do_sample": True, "temperature": settings.temperature}
    by_category: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in items:
        by_category[item["category"]].append(item)
    for category, its in by_category.items():
        task, file = task_name(category), f"{plain(category)}.jsonl"
        # Ground truths differ in shape, and a column has one type: text.
        rows = [
            {
                **{"id": item["id"], "prompt": item["text"], "verifier": item["verifier"]},
                "ground_truth": json.dumps(item["ground_truth"]),
            }
            for item in its
        ]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = TASK.format(task=task, file=file, generation=json.dumps(generation))
        (folder / f"{task}.yaml").write_text(text)
    tasks = json.dumps([task_name(category) for category in by_category])
    (folder / f"{GROUP}.yaml").write_text(ALL.format(group=GROUP, tasks=tasks))


def task_name(category: str) -> str:
    return f"{GROUP}_{plain(category)}"
