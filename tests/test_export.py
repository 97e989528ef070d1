"""The exported model: plain Hugging Face files, a model card, rewritten only when it must be."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from bar_ray import config, pipeline, storage
from bar_ray.export import export
from bar_ray.pipeline import Pipeline
from bar_ray.recipe import Recipe

RECIPE = """
storage: "{storage}"
datasets: {{text: tiny:text.parquet, sft: tiny:sft.jsonl}}
tiny:
  pretrain: {{data: {{text: 1}}, steps: 4}}
  post_train: {{data: {{sft: 1}}, steps: 4}}
experts:
  math: {{midtrain: {{data: {{text: 1}}, steps: 2}}, sft: {{data: {{sft: 1}}, steps: 2}}}}
  safety: {{sft: {{data: {{sft: 1}}, steps: 3}}}}
router: {{steps: {steps}}}
evaluate: {{categories: {{math: tiny:m.jsonl}}}}
"""
ROUTED = {
    "config.json": json.dumps({"model_type": "flex_olmo", "eos_token_id": 0, "num_experts": 3}),
    "model.safetensors": "weights " * 100,
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "router_load.json": "{}",
    "modeling_evil.py": "raise SystemExit",
    "pytorch_model.bin": "pickle",
}
PLAIN = {
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
}
SCORES = {
    "models": {
        "base": {"math": 2.0, "safety": 31.0, "overall": 16.5},
        "math sft": {"math": 60.0, "safety": 30.0, "overall": 45.0},
        "bar": {"math": 57.123, "safety": 100.0, "overall": 78.56},
    }
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAR_RAY_CACHE", str(tmp_path / "cache"))
    # The real ones are in test_end_to_end: here is neither a tokenizer nor a test.
    monkeypatch.setattr("bar_ray.export._write_tasks", lambda *_: None)


def routed(folder: Path, root: str, steps: int = 4, **files: str) -> tuple[Pipeline, Recipe]:
    """A pipeline whose routed model is committed."""
    (folder / "recipe.yaml").write_text(RECIPE.format(storage=root, steps=steps))
    recipe = config.load(str(folder / "recipe.yaml"))
    graph = pipeline.build(recipe)
    work = folder / "work"
    work.mkdir()
    for name, content in {**ROUTED, **files}.items():
        (work / name).write_text(content)
    storage.commit(str(work), graph.bar.artifact.uri, {})
    return graph, recipe


def test_a_plain_folder_with_card_and_manifest(root: str, tmp_path: Path) -> None:
    graph, recipe = routed(tmp_path, root)
    place = export(graph, recipe, SCORES)
    target = storage.join(root, "model")
    manifest = storage.verify(target)
    assert place == storage.join(target, manifest.data)
    assert set(manifest.files) == PLAIN
    for name in ("config.json", "model.safetensors", "chat_template.jinja"):
        assert storage.read_bytes(storage.join(place, name)).decode() == ROUTED[name]
    generation = storage.join(place, "generation_config.json")
    assert storage.read_json(generation) == {"eos_token_id": 0}
    assert manifest.info["fingerprint"] == graph.bar.fingerprint
    assert manifest.info["experts"]["math"]["sft"] == graph.stages["math"]["sft"].fingerprint
    storage.verify(graph.bar.artifact.uri)  # the artifact itself is as it was
    assert not storage.list_files(storage.join(root, "tmp"), recursive=True)


def test_the_card_says_scores_lineage_and_use(tmp_path: Path) -> None:
    graph, recipe = routed(tmp_path, str(tmp_path / "store"))
    card = ModelCard.load(Path(export(graph, recipe, SCORES), "README.md"))
    results = {r.dataset_name: r.metric_value for r in card.data.eval_results}
    assert results == {"math (held out)": 57.12, "safety (held out)": 100.0}
    assert card.data.library_name == "transformers"
    assert "| math sft | **60.0** | 30.0 | 45.0 |" in card.text
    assert f"| 2 | safety | sft `{graph.stages['safety']['sft'].fingerprint}` |" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text and "vllm serve" in card.text
    assert "trust_remote_code" not in card.text and str(tmp_path) not in card.text


def test_the_same_model_is_not_written_again(root: str, tmp_path: Path) -> None:
    graph, recipe = routed(tmp_path, root)
    place = export(graph, recipe, SCORES)
    before = storage.read_bytes(storage.join(root, "model", storage.MANIFEST))
    storage.delete(graph.bar.artifact.uri)  # nothing is even read
    assert export(graph, recipe, SCORES) == place
    assert storage.read_bytes(storage.join(root, "model", storage.MANIFEST)) == before


def test_new_scores_or_a_new_model_replace_it(root: str, tmp_path: Path) -> None:
    graph, recipe = routed(tmp_path, root)
    export(graph, recipe, SCORES)
    better = {
        "models": {**SCORES["models"], "bar": {"math": 59.0, "safety": 99.0, "overall": 79.0}}
    }
    place = export(graph, recipe, better)
    assert b"| bar | 59.0 |" in storage.read_bytes(storage.join(place, "README.md"))
    graph, recipe = routed(tmp_path, root, steps=5, **{"model.safetensors": "other"})
    place = export(graph, recipe, better)
    assert storage.read_bytes(storage.join(place, "model.safetensors")) == b"other"
    assert set(storage.verify(storage.join(root, "model")).files) == PLAIN


def test_a_file_that_went_missing_is_put_back(root: str, tmp_path: Path) -> None:
    graph, recipe = routed(tmp_path, root)
    place = export(graph, recipe, SCORES)
    storage.delete(storage.join(place, "model.safetensors"))
    export(graph, recipe, SCORES)
    storage.verify(storage.join(root, "model"))


def test_a_damaged_model_is_not_exported(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    graph, recipe = routed(tmp_path, root)
    export(graph, recipe, SCORES)
    storage.write_bytes(storage.join(graph.bar.artifact.uri, "model.safetensors"), b"short")
    with pytest.raises(storage.StorageError, match="damaged"):
        export(graph, recipe, {"models": {}})
    storage.verify(storage.join(root, "model"))  # the old one is still there
