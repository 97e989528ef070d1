"""The shape of one row of tiny data, the words it is made of, and which items are held out.

What is held out depends on the item alone (a hash of its key), never on the seed or on the file:
every generator, raw text included, asks the same question, so no test item can leak into training.
"""

import hashlib
import random
from typing import Any

Row = dict[str, Any]

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
HELD_OUT_SHARE = 0.1


def held_out(key: str) -> bool:
    """True for the tenth of all items that only tests may use."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def word(rng: random.Random, test: bool = False) -> str:
    """A pronounceable word of three or four letters, from the held-out words if `test`."""
    while True:
        text = rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS)
        if rng.random() < 0.5:
            text += rng.choice(VOWELS)
        if held_out(text) == test:
            return text


def source_of(domain: str, careful: bool) -> str:
    """The source an SFT row belongs to: real mixes have better and worse ones."""
    return f"{domain}_{'careful' if careful else 'careless'}"


def text_row(text: str, source: str) -> Row:
    """One document for pretraining or mid-training."""
    return {"text": text, "source": source}


def chat_row(prompt: str, answer: str, source: str) -> Row:
    """One user turn and its answer, for SFT."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "source": source}


def check_row(prompt: str, ground_truth: Any, verifier: str, source: str) -> Row:
    """A prompt whose answer the named verifier can check, for RLVR and for tests."""
    return {
        "messages": [{"role": "user", "content": prompt}],
        "ground_truth": ground_truth,
        "verifier": verifier,
        "source": source,
    }
