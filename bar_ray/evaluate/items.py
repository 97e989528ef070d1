"""What a checkpoint is asked, and how its answers are graded."""

import itertools
import json
from pathlib import Path
from typing import Any

from bar_ray.data import chat, formats
from bar_ray.recipe import Evaluate
from bar_ray.rollout.records import check
from bar_ray.types import UserError


def test_items(folder: str, category: str, uri: str, limit: int) -> list[dict[str, Any]]:
    """The prompts of one category as tokens and as text, with how to grade them."""
    tokenizer = chat.load_tokenizer(folder)
    items = []
    for number, row in enumerate(
        itertools.islice(formats.read_rows(uri, "prompts"), limit or None)
    ):
        check(row, uri, number)
        items.append(
            {
                **{"category": category, "id": str(row.get("id", number))},
                **{"verifier": row["verifier"], "ground_truth": row.get("ground_truth")},
                "prompt": chat.prompt(tokenizer, row),
                "text": chat.prompt_text(tokenizer, row),
            }
        )
    if not items:
        raise UserError(f"{uri} has no test items for {category}")
    return items


def require_positions(folder: str, items: list[dict], settings: Evaluate) -> None:
    """Refuse tests that the model has no positions for, before an engine is started."""
    there = json.loads(Path(folder, "config.json").read_text()).get("max_position_embeddings")
    longest = max(len(item["prompt"]) for item in items)
    if there and longest + settings.max_tokens > there:
        raise UserError(
            f"evaluate.max_tokens is {settings.max_tokens} and the longest prompt has {longest} "
            f"tokens, but the model has positions for {there}: lower evaluate.max_tokens"
        )
