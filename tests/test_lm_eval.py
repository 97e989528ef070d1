"""Intervals of scores, and our tests as task files of lm-evaluation-harness."""

import json
from pathlib import Path

import pytest

from bar_ray.evaluate import grading, intervals, tasks
from bar_ray.evaluate.items import test_items as items_of
from bar_ray.recipe import Evaluate
from bar_ray.tiny.tokenizer import build_tokenizer

LETTERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ROWS = {
    "math": [
        {"verifier": "math", "ground_truth": "12", "prompt": "5+7"},
        {"verifier": "math", "ground_truth": "13", "prompt": "6+7"},
    ],
    "tool_use": [
        {
            "id": "t7",
            "verifier": "tool_call",
            "ground_truth": [{"name": "weather", "arguments": {"city": "rome"}}],
            "messages": [{"role": "user", "content": "weather in rome?"}],
            "tools": [{"type": "function", "function": {"name": "weather", "parameters": LETTERS}}],
        }
    ],
}
GOLD = {
    "5+7": r"5+7=12 \boxed{12}",
    "6+7": r" \boxed{13} ",
    "weather": '<tool_call>{"name": "weather", "arguments": {"city": "rome"}}</tool_call>',
}


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[dict]]:
    """A model's folder with tasks, and the items they ask."""
    build_tokenizer().save_pretrained(tmp_path)
    asked = []
    for category, rows in ROWS.items():
        file = tmp_path / f"{category}.jsonl"
        rows = [
            {"messages": [{"role": "user", "content": r["prompt"]}], **r} if "prompt" in r else r
            for r in rows
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked += items_of(str(tmp_path), category, str(file), 0)
    tasks.write(tmp_path / "lm_eval", tmp_path, asked, Evaluate(max_tokens=32))
    return tmp_path / "lm_eval", asked


@pytest.mark.parametrize("items", [1, 7, 120, 1319])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.91, 1.0])
def test_wilson_agrees_with_scipy(items: int, share: float) -> None:
    from scipy.stats import binomtest

    right = round(share * items)
    expected = binomtest(right, items).proportion_ci(0.95, "wilson")
    found = intervals.wilson(right / items, items)
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-3)


def test_a_mean_of_categories_is_never_certain() -> None:
    low, high = intervals.of_mean([(0.5, 1.0, 120), (0.5, 1.0, 120)])
    assert 98 < low < 99.9 and high == 100
    low, high = intervals.of_mean([(1 / 3, 0.5, 100), (1 / 3, 0.9, 400), (1 / 3, 0.7, 100)])
    assert low < 70 < high and 4 < high - low < 12
    alone, wilson = intervals.of_mean([(1.0, 0.5, 200)]), intervals.wilson(0.5, 200)
    assert alone == pytest.approx(wilson, abs=0.1)


def test_a_category_of_a_set_has_files_of_its_own(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    item = {"id": "0", "text": "5+7", "verifier": "math", "ground_truth": "12"}
    asked = [{**item, "category": category} for category in ("math/sums", "math/words")]
    tasks.write(tmp_path / "lm_eval", tmp_path, asked, Evaluate(max_tokens=32))
    for name in ("math-sums", "math-words"):
        assert (tmp_path / "lm_eval" / f"{name}.jsonl").read_text().count("\n") == 1
        assert f"task: bar_{name}\n" in (tmp_path / "lm_eval" / f"bar_{name}.yaml").read_text()
    assert '["bar_math-sums", "bar_math-words"]' in (tmp_path / "lm_eval" / "bar.yaml").read_text()


def test_prompts_as_text_give_the_same_tokens(written: tuple[Path, list[dict]]) -> None:
    tokenizer = build_tokenizer()
    for item in written[1]:
        assert tokenizer.encode(item["text"], add_special_tokens=False) == item["prompt"]
    assert "weather" in written[1][-1]["text"].split("rome")[0], "tools are rendered"


def test_the_harness_grades_as_we_do(written: tuple[Path, list[dict]]) -> None:
    """Its own loader and evaluator, with answers instead of a model."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs bar_ray[eval]")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    folder, asked = written
    seen = []

    class Answers(LM):
        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            seen.extend(request.args for request in requests)
            found = [next(a for q, a in GOLD.items() if q in r.args[0]) for r in requests]
            return ["wrong", *found[1:]]

        loglikelihood = loglikelihood_rolling = None

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        manager = TaskManager(include_path=".", include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=Answers(), tasks=["bar"], task_manager=manager, bootstrap_iters=0
        )
    assert [prompt for prompt, _ in seen] == [item["text"] for item in asked]
    ends = {"<|im_end|>", "<|endoftext|>", "<|im_start|>"}
    assert all(ends <= {*how["until"]} and how["max_gen_toks"] == 32 for _, how in seen)
    scores = {task: result["score,graded"] for task, result in found["results"].items()}
    assert scores == {"bar": 0.75, "bar_math": 0.5, "bar_tool_use": 1.0}


def test_verdicts_come_in_the_order_of_the_answers() -> None:
    docs = [{"verifier": "math", "ground_truth": json.dumps(str(n))} for n in range(4)]
    answers = [[rf"\boxed{{{n}}}", "no"] for n in (0, 9, 2, 3)]
    graded = grading.grade_all(answers, docs)
    assert [[v["score"] for v in each] for each in graded] == [[1, 0], [0, 0], [1, 0], [1, 0]]
    assert grading.score(docs[0], graded[0][:1]) == {"score": 1.0}
