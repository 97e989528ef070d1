"""The tiny world is deterministic, well formed, and its tests share nothing with its training."""

import filecmp
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bar_ray.tiny import code, math
from bar_ray.tiny.model import tiny_config, tiny_generation_config
from bar_ray.tiny.rows import Row
from bar_ray.tiny.tokenizer import CALL_START, MAX_LENGTH, TURN_END, build_tokenizer
from bar_ray.tiny.world import NUM_HELD_OUT, NUM_TEST, prompt_key, write_world

DOMAINS = ("general", "math", "code", "tool_use", "safety")
PACKED_LENGTH = 128


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(str(root), seed=3)
    return root


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def read(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def sft(world: Path, domain: str) -> list[dict]:
    """Every SFT row of a domain, whatever the files it is split into."""
    return [row for path in sorted((world / domain).glob("sft*.jsonl")) for row in read(path)]


def data_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_same_seed_writes_the_same_bytes(world: Path, tmp_path: Path) -> None:
    write_world(str(tmp_path / "same"), seed=3)
    write_world(str(tmp_path / "other"), seed=4)
    for path in data_files(world):
        name = path.relative_to(world)
        assert filecmp.cmp(path, tmp_path / "same" / name, shallow=False), name
        assert not filecmp.cmp(path, tmp_path / "other" / name, shallow=False), name


def test_every_stage_has_its_file_and_every_row_its_id(world: Path) -> None:
    names = {str(path.relative_to(world)) for path in data_files(world)}
    tasks = ("rlvr.jsonl", "held_out.jsonl")
    staged = ("midtrain.parquet", *tasks, "sft_careful.jsonl", "sft_careless.jsonl")
    rlvr = {f"{domain}/{file}" for domain in ("math", "code") for file in staged}
    plain = {f"{domain}/sft.jsonl" for domain in ("general", "tool_use", "safety")}
    tests = {f"{domain}/test.jsonl" for domain in DOMAINS}
    others = {"pretrain.parquet", "tool_use/sft_rare.jsonl"}
    assert names == others | rlvr | plain | tests
    rows = [row for path in data_files(world) for row in read(path)]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(isinstance(row["source"], str) and row["source"] for row in rows)


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_have_the_shape_of_their_stage(world: Path, domain: str) -> None:
    for row in sft(world, domain):
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        for call in row["messages"][-1].get("tool_calls", []):
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
    tests = read(world / domain / "test.jsonl")
    assert 0.7 * NUM_TEST < len(tests) <= NUM_TEST
    assert len({prompt_key(row) for row in tests}) == len(tests)
    verifier = {"general": "instruction", "tool_use": "tool_call"}.get(domain, domain)
    for row in tests:
        assert [m["role"] for m in row["messages"]] == ["user"]
        assert row["verifier"] == verifier and row["ground_truth"] is not None


@pytest.mark.parametrize("domain", ["math", "code"])
def test_held_out_prompts_are_not_trained_on(world: Path, domain: str) -> None:
    trained, held_out = (
        {prompt_key(row) for row in read(world / domain / file)}
        for file in ("rlvr.jsonl", "held_out.jsonl")
    )
    assert len(held_out) == NUM_HELD_OUT and not held_out & trained


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_test_prompt_is_in_training(world: Path, domain: str) -> None:
    tests = {row["messages"][0]["content"] for row in read(world / domain / "test.jsonl")}
    for other in DOMAINS:
        for path in (world / other).glob("*.jsonl"):
            if path.stem != "test":
                assert tests.isdisjoint(row["messages"][0]["content"] for row in read(path))


def test_no_test_problem_is_in_any_text(world: Path) -> None:
    """Not as a raw sum, program, specification, tool request or deed either."""
    texts = [path.read_text() for path in world.rglob("*.jsonl") if path.stem != "test"]
    texts += [row["text"] for path in world.rglob("*.parquet") for row in read(path)]
    everything = "\n".join(texts)
    seen_sums = set(re.findall(r"\d+\+\d+", everything))
    seen_specs = set(re.findall(r"x[+*-]\d,\d+ at \w+", everything))
    seen_calls = set(re.findall(r"(?:min|max)\(x[+*-]\d,\d+\)", everything))
    assert seen_sums and seen_specs and seen_calls
    for row in read(world / "math" / "test.jsonl"):
        assert re.search(r"\d+\+\d+", row["messages"][0]["content"])[0] not in seen_sums
    for row in read(world / "code" / "test.jsonl"):
        spec = re.search(r"(x[+*-]\d,\d+) at (\w+)", row["messages"][0]["content"])
        limit = {"most": "min", "least": "max"}[spec[2]]
        assert spec[0] not in seen_specs
        assert f"{limit}({spec[1]})" not in seen_calls
    for row in read(world / "tool_use" / "test.jsonl"):
        assert row["messages"][0]["content"] not in everything
    for row in read(world / "safety" / "test.jsonl"):
        deed = " ".join(row["messages"][0]["content"].rstrip("?.").split()[-2:])
        assert not re.search(rf"{deed}\b", everything)


def test_the_base_never_sees_a_tool_call(world: Path) -> None:
    for name in ("pretrain.parquet", "general/sft.jsonl"):
        assert all(CALL_START not in json.dumps(row) for row in read(world / name))
        assert all("tool_calls" not in json.dumps(row) for row in read(world / name))


def test_the_right_strategy_is_right_and_the_other_is_not() -> None:
    assert math.worked(47, 38) == "7+8=15 4+3+1=8 \\boxed{85}"
    assert math.worked(41, 88) == "1+8=9 4+8=12 \\boxed{129}"
    assert math.rounded(47, 38) == "~50+40 \\boxed{90}"
    task = code.Task("*", 3, "min", 20)
    scope: dict = {}
    exec(task.careful, scope)
    assert [scope["f"](x) for x in (0, 6, 7)] == [task(x) for x in (0, 6, 7)] == [0, 18, 20]
    exec(task.careless, scope)
    assert scope["f"](7) == 21


@pytest.mark.parametrize("domain", ["math", "code"])
def test_both_strategies_are_half_of_the_sft_data(world: Path, domain: str) -> None:
    careful = read(world / domain / "sft_careful.jsonl")
    careless = read(world / domain / "sft_careless.jsonl")
    assert all(row["messages"][-1]["content"][0] not in "~f" for row in careful)
    assert all(row["messages"][-1]["content"][0] in "~f" for row in careless)
    assert 0.45 < len(careful) / len(careful + careless) < 0.55
    for style in {row["messages"][0]["content"][0] for row in careful} & set("Wf"):
        counts = [
            sum(row["messages"][0]["content"][0] == style for row in rows)
            for rows in (careful, careless)
        ]
        share = counts[0] / sum(counts)
        assert 0.25 < share < 0.35 or 0.65 < share < 0.75, "the phrasing hints at the strategy"


def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(chr(i) for i in range(32, 127)) + "\n a  b\n\n<tool_call>{}</tool_call>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 95 + 8 + 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id in tokenizer("é")["input_ids"]


def test_assistant_mask_covers_the_answer_and_its_end(
    world: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for domain in DOMAINS:
        row = sft(world, domain)[0]
        full = tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        pairs = zip(full["input_ids"], full["assistant_masks"], strict=True)
        answer = tokenizer.decode([token for token, inside in pairs if inside])
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1],
            tools=row.get("tools"),
            add_generation_prompt=True,
            tokenize=False,
        )
        assert prompt + answer + "\n" == tokenizer.decode(full["input_ids"])
        assert answer.endswith(TURN_END)
        assert row["messages"][-1]["content"] in answer


def test_tools_and_calls_are_rendered_compactly(tokenizer: PreTrainedTokenizerFast) -> None:
    properties = {"city": {"type": "string"}, "song": None}
    tool = {
        "type": "function",
        "function": {"name": "sky", "parameters": {"properties": properties}},
    }
    for arguments in ({"city": "bamo"}, '{"city":"bamo"}'):
        call = {"type": "function", "function": {"name": "sky", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "Weather in bamo?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
        assert text == (
            "<|im_start|>system\nsky(city)<|im_end|>\n"
            "<|im_start|>user\nWeather in bamo?<|im_end|>\n"
            '<|im_start|>assistant\n<tool_call>{"name":"sky","arguments":{"city":"bamo"}}'
            "</tool_call><|im_end|>\n"
        )


def test_everything_fits_a_packed_row(world: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [row["text"] for path in world.rglob("*.parquet") for row in read(path)]
    for path in world.rglob("*.jsonl"):
        rows = sorted(read(path), key=lambda row: len(json.dumps(row)))[-200:]
        texts += [
            tokenizer.apply_chat_template(r["messages"], tools=r.get("tools"), tokenize=False)
            for r in rows
        ]
    longest = sorted(texts, key=len)[-500:]
    assert max(len(ids) for ids in tokenizer(longest)["input_ids"]) < PACKED_LENGTH


def test_model_config_matches_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    config = tiny_config()
    assert config.vocab_size == len(tokenizer) and config.pad_token_id == tokenizer.pad_token_id
    assert config.max_position_embeddings == MAX_LENGTH
    ends = tiny_generation_config().eos_token_id
    assert tokenizer.convert_ids_to_tokens(ends) == [TURN_END, tokenizer.eos_token]
