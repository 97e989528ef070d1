"""Branch, surgery, freezing and merging on a small random model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM

from bar_ray.data.batches import MicroBatch
from bar_ray.merge import merge, with_rows
from bar_ray.model import average, branch, experts, freeze, fused, tensors
from bar_ray.model.tensors import Checkpoint
from bar_ray.recipe import ROLES, Learn, Merge
from bar_ray.train.loss import token_logprobs
from bar_ray.types import UserError

TOKENS = torch.arange(60).reshape(2, 30)


def dense(folder: Path, seed: int, **changes: object) -> Checkpoint:
    torch.manual_seed(seed)
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
    }
    model = Olmo2ForCausalLM(Olmo2Config(**{**config, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return Checkpoint(folder)


@pytest.fixture
def post(tmp_path: Path) -> Checkpoint:
    return dense(tmp_path / "post", 0)


@pytest.fixture
def branched(tmp_path: Path, post: Checkpoint) -> Checkpoint:
    """A branch whose expert differs from its anchor."""
    branch.branch(post, dense(tmp_path / "pre", 1), str(tmp_path / "branch"), std=0.5, seed=0)
    return Checkpoint(tmp_path / "branch")


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(TOKENS).logits.detach()


def test_untrained_branch_reproduces_the_dense_model(tmp_path: Path, post: Checkpoint) -> None:
    branch.branch(post, post, str(tmp_path / "branch"), std=0.5, seed=0)
    assert (logits(tmp_path / "branch") - logits(post.folder)).abs().max() < 1e-4
    theta = Checkpoint(tmp_path / "branch").config["rope_parameters"]["rope_theta"]
    assert theta == 20_000.0, "rope parameters must be copied: the defaults of the families differ"


def test_expert_starts_from_the_pretrained_ffn(branched: Checkpoint, tmp_path: Path) -> None:
    post, pre = Checkpoint(tmp_path / "post"), Checkpoint(tmp_path / "pre")
    name = "model.layers.1.mlp.{}up_proj.weight"
    assert torch.equal(branched[name.format("experts.0.")], post[name.format("")])
    assert torch.equal(branched[name.format("experts.1.")], pre[name.format("")])
    assert torch.equal(branched["lm_head.weight"], post["lm_head.weight"])


def test_split_model_agrees_with_hugging_face(branched: Checkpoint) -> None:
    model = experts.load(branched.folder, torch.float32)
    assert (model(TOKENS).logits - logits(branched.folder)).abs().max() < 1e-4


@pytest.mark.parametrize("learns", [{"expert": 1.0}, dict.fromkeys(ROLES, 1.0), {"router": 1.0}])
@pytest.mark.parametrize("top_k", [3, 2, 1])
def test_kernels_agree_with_plain_torch(
    branched: Checkpoint, tmp_path: Path, top_k: int, learns: dict
) -> None:
    """Log-probabilities, entropies, every gradient; fewer active experts than all but one too."""
    models = {name: trained(branched, tmp_path / name, i) for i, name in enumerate("ab")}
    merge(branched, models, str(tmp_path / "merged"), Merge())

    def run(kernels: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        model = fused.load(tmp_path / "merged", torch.float32, top_k, kernels)
        freeze.apply(model, Learn(**learns))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        positions = torch.arange(12).remainder(7).expand(2, -1)
        tokens = torch.randint(0, 24, (2, 12), generator=torch.Generator().manual_seed(top_k))
        found = token_logprobs(model, MicroBatch(tokens, (positions > 1).long(), positions), 0.8)
        (found[0] * torch.linspace(-1, 1, len(found[0]))).sum().backward()
        return list(found), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    (values, gradients), (plain, expected) = run("auto"), run("reference")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(values, plain, strict=True))
    assert gradients.keys() == expected.keys() and gradients
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5, rtol=1e-3), name


def test_saving_gives_back_the_same_bytes(branched: Checkpoint, tmp_path: Path) -> None:
    experts.save(experts.load(branched.folder, torch.float32), tmp_path / "saved", branched.folder)
    saved = Checkpoint(tmp_path / "saved")
    assert saved.names == branched.names
    assert all(torch.equal(saved[name], branched[name]) for name in saved.names)
    assert (tmp_path / "saved" / "tokenizer_config.json").exists()


def test_many_shards_load_like_one(branched: Checkpoint, tmp_path: Path) -> None:
    specs = {name: branched.spec(name) for name in branched.names}
    arguments = (branched.config, specs, branched.__getitem__)
    tensors.write(tmp_path / "shards", *arguments, shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert torch.equal(logits(tmp_path / "shards"), logits(branched.folder))


def test_top_k_below_all_zeroes_the_others() -> None:
    gates = experts.gate_weights(torch.tensor([[3.0, 1.0, 2.0]]), top_k=2, renormalise=False)
    full = torch.softmax(torch.tensor([3.0, 1.0, 2.0]), 0)
    assert torch.allclose(gates[0], torch.tensor([full[0], 0.0, full[2]]))


def step_once(folder: Path, learn: Learn) -> tuple[dict, dict]:
    """Tensors by name before and after one large optimizer step under a freeze table."""
    model = experts.load(folder, torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = freeze.apply(model, learn)
    optimizer = torch.optim.AdamW(
        [{"params": g["params"], "lr": 0.1 * g["scale"]} for g in groups], weight_decay=0.0
    )
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    return before, dict(model.named_parameters())


@pytest.mark.parametrize("role", ROLES)
def test_one_step_moves_only_the_roles_of_the_freeze_table(branched: Checkpoint, role: str) -> None:
    before, after = step_once(branched.folder, Learn(**{role: 1.0}))
    for name, value in after.items():
        if tensors.role_of(name) == role:
            assert value.grad is not None and not torch.equal(value, before[name]), name
        else:
            assert value.grad is None and torch.equal(value, before[name]), name


def test_anchor_keeps_its_router_row_frozen(branched: Checkpoint) -> None:
    before, after = step_once(branched.folder, Learn(expert=1.0, router=1.0))
    assert torch.equal(
        after["model.layers.0.mlp.gate.rows.0"], before["model.layers.0.mlp.gate.rows.0"]
    )
    assert not torch.equal(
        after["model.layers.0.mlp.gate.rows.1"], before["model.layers.0.mlp.gate.rows.1"]
    )


def test_every_tensor_has_a_role(branched: Checkpoint, post: Checkpoint) -> None:
    model = experts.load(branched.folder, torch.float32)
    assert {tensors.role_of(name) for name, _ in model.named_parameters()} == set(ROLES)
    assert "anchor" not in {tensors.role_of(name) for name in post.names}


def trained(branched: Checkpoint, folder: Path, seed: int) -> Checkpoint:
    """A two-expert model that moved everywhere but in its anchor."""
    generator = torch.Generator().manual_seed(seed)
    specs = {name: branched.spec(name) for name in branched.names}

    def moved(name: str) -> torch.Tensor:
        value = branched[name].clone()
        if ".experts.0." not in name:
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("gate.weight"):
                noise[0] = 0
            value += noise
        return value

    tensors.write(folder, branched.config, specs, moved, branched.folder)
    return Checkpoint(folder)


def test_merging_untouched_branches_gives_the_base_back(
    branched: Checkpoint, tmp_path: Path
) -> None:
    merge(branched, dict.fromkeys("abc", branched), str(tmp_path / "merged"), Merge())
    assert (logits(tmp_path / "merged") - logits(branched.folder)).abs().max() > 0  # 3 expert gates
    merged = Checkpoint(tmp_path / "merged")
    assert merged.config["num_experts"] == merged.config["num_experts_per_tok"] == 4
    for name in branched.names:
        if ".experts." not in name and not name.endswith("gate.weight"):
            assert torch.equal(merged[name], branched[name]), name


@pytest.mark.parametrize("kept", ["abc", "ac", "b"])
def test_a_subset_is_the_merge_of_its_experts_with_their_rows_of_the_router(
    branched: Checkpoint, tmp_path: Path, kept: str
) -> None:
    models = {name: trained(branched, tmp_path / name, i) for i, name in enumerate("abc", 1)}
    merge(branched, models, str(tmp_path / "merged"), Merge())
    routed = trained(Checkpoint(tmp_path / "merged"), tmp_path / "routed", 9)
    merge(branched, {n: models[n] for n in kept}, str(tmp_path / "some"), Merge())
    some, rows = Checkpoint(tmp_path / "some"), [0, *(" abc".index(name) for name in kept)]
    with_rows(some, routed, rows, str(tmp_path / "subset"))
    found = Checkpoint(tmp_path / "subset")
    assert found.names == some.names
    assert found.config["num_experts"] == found.config["num_experts_per_tok"] == len(rows)
    for name in found.names:
        expected = routed[name][rows] if name.endswith("mlp.gate.weight") else some[name]
        assert torch.equal(found[name], expected), name
    assert logits(tmp_path / "subset").isfinite().all()


def test_merging_untouched_branches_of_one_dense_model_keeps_its_logits(
    post: Checkpoint, tmp_path: Path
) -> None:
    branch.branch(post, post, str(tmp_path / "same"), std=0.5, seed=0)
    same = Checkpoint(tmp_path / "same")
    merge(same, dict.fromkeys("abcd", same), str(tmp_path / "merged"), Merge())
    assert (logits(tmp_path / "merged") - logits(post.folder)).abs().max() < 1e-4


def test_merge_averages_shared_and_copies_experts(branched: Checkpoint, tmp_path: Path) -> None:
    models = [trained(branched, tmp_path / f"expert{i}", i) for i in (1, 2)]
    merge(branched, dict(zip("ab", models, strict=True)), str(tmp_path / "merged"), Merge())
    merged = Checkpoint(tmp_path / "merged")
    head = torch.stack([m["lm_head.weight"] for m in (branched, *models)]).mean(0)
    assert torch.allclose(merged["lm_head.weight"], head, atol=1e-6)
    for slot, model in enumerate(models, start=1):
        name = "model.layers.0.mlp.experts.{}.down_proj.weight"
        assert torch.equal(merged[name.format(slot)], model[name.format(1)])
        gate = "model.layers.0.mlp.gate.weight"
        assert torch.equal(merged[gate][slot], model[gate][1])
    anchor = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert torch.equal(merged[anchor], branched[anchor])


RULES = (
    Merge(include_base=False),
    Merge(rule="one", expert="b"),
    Merge(rule="sum", scale=0.5),
    Merge(rule="ties", density=0.3),
    Merge(rule="fisher"),
)


@pytest.mark.parametrize("settings", RULES, ids=lambda settings: settings.rule)
def test_every_rule_keeps_what_nobody_moved(
    branched: Checkpoint, tmp_path: Path, settings: Merge
) -> None:
    models = dict.fromkeys("ab", branched)
    merge(branched, models, str(tmp_path / "merged"), settings, fishers=models)
    merged = Checkpoint(tmp_path / "merged")
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        assert torch.equal(merged[name], branched[name])


def test_rules_of_merging_by_hand() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    one, two = torch.tensor([3.0, 1.0, 0.0, 1.5]), torch.tensor([2.0, 1.0, 5.0, 1.25])
    assert average.sum_of_deltas(base, [one, two], 0.5).tolist() == [2.5, 1.0, 2.5, 1.375]
    # Half of each delta is kept: [2, 0, -1, 0] and [1, 0, 4, 0]; the third sign is elected +.
    assert average.ties(base, [one, two], 0.5, 1.0).tolist() == [2.5, 1.0, 5.0, 1.0]
    weights = [torch.tensor([3.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 2.0, 0.0])]
    assert average.fisher([one, two], weights).tolist() == [2.75, 1.0, 5.0, 1.5]


def test_one_expert_may_give_the_shared_weights(branched: Checkpoint, tmp_path: Path) -> None:
    models = {name: trained(branched, tmp_path / name, i) for i, name in enumerate("ab")}
    merge(branched, models, str(tmp_path / "merged"), Merge(rule="one", expert="b"))
    head = Checkpoint(tmp_path / "merged")["lm_head.weight"]
    assert torch.equal(head, models["b"]["lm_head.weight"])


def test_packed_documents_do_not_attend_across(branched: Checkpoint) -> None:
    model = experts.load(branched.folder, torch.float32)
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None].expand(2, -1)
    packed = model(TOKENS, position_ids=positions, use_cache=False).logits
    alone = model(TOKENS[:, 12:], use_cache=False).logits
    assert (packed[:, 12:] - alone).abs().max() < 1e-4
    across = model(TOKENS, use_cache=False).logits
    assert (across[:, 12:] - alone).abs().max() > 1e-2, "without positions documents would mix"


def test_bad_checkpoints_are_refused_with_a_reason(tmp_path: Path, post: Checkpoint) -> None:
    other = dense(tmp_path / "wide", 0, intermediate_size=64)
    with pytest.raises(UserError, match="one family and size"):
        branch.branch(post, other, str(tmp_path / "x"), std=0.02, seed=0)
    with pytest.raises(UserError, match="two-expert branch"):
        merge(post, {"a": post}, str(tmp_path / "x"), Merge())
    file = post.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Checkpoint(post.folder)


def test_tensors_of_several_types_are_aligned(tmp_path: Path) -> None:
    stored = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.randn(2), "c": torch.ones(())}
    tensors.save(tmp_path / "model.safetensors", stored)
    header = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    offsets = {
        k: v["data_offsets"] for k, v in json.loads(header[8 : 8 + size]).items() if k in stored
    }
    assert size % 8 == 0 and offsets == {"b": [0, 8], "c": [8, 12], "a": [12, 18]}
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in stored.items())
