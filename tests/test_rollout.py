"""The rollout engine against transformers: same log-probabilities, before and after each push.

The engine is a Ray actor, transformers runs here: vLLM patches its classes where it is loaded.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.actor import ActorHandle
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from bar_ray.rollout.engine import EngineOptions, RolloutEngine, Sampling
from bar_ray.rollout.weights import as_array, complete_layers, shared_files, tensor_digest

TOLERANCE = 1e-3
DEADLINE_S = 120
VOCAB = 100
OPTIONS = EngineOptions(max_model_len=256, max_num_seqs=64, kv_cache_bytes=64 << 20)
Tensors = dict[str, np.ndarray]


def test_complete_layers() -> None:
    mlp = "model.layers.1.mlp"
    parts = ("gate_proj", "up_proj", "down_proj")
    experts = {f"{mlp}.experts.{e}.{part}.weight" for e in range(2) for part in parts}
    qkv = {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"}
    dense = {"model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight"}
    biased = {"model.layers.2.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.bias"}
    alone = {f"{mlp}.gate.weight", "lm_head.weight", "model.layers.0.self_attn.o_proj.weight"}
    names = experts | qkv | dense | biased | alone

    assert complete_layers({f"{mlp}.experts.1.up_proj.weight"}, names) == experts
    assert complete_layers({"model.layers.0.self_attn.v_proj.weight"}, names) == qkv
    assert complete_layers({"model.layers.2.mlp.up_proj.weight"}, names) == dense
    assert complete_layers({"model.layers.2.mlp.down_proj.bias"}, names) == biased
    assert complete_layers(alone, names) == alone
    packed = {f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj"}
    assert complete_layers({f"{mlp}.experts.down_proj"}, packed) == packed
    with pytest.raises(ValueError, match="does not have"):
        complete_layers({"model.layers.9.mlp.gate.weight"}, names)


def test_shared_files_are_removed(tmp_path: Path) -> None:
    tensors = {"lm_head.weight": np.ones((2, 3), np.float32)}
    with shared_files(tensors, str(tmp_path)) as (path,):
        assert np.array_equal(load_file(path)["lm_head.weight"], tensors["lm_head.weight"])
    assert [p.name for p in tmp_path.rglob("*")] == [f"bar_ray-{os.getuid()}"], "an empty folder"
    with pytest.raises(FileNotFoundError), shared_files(str(tmp_path), "/dev/shm"):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_travel_in_their_own_type(dtype: torch.dtype, tmp_path: Path) -> None:
    sent = torch.randn(3, 4).to(dtype)
    array = as_array(sent)
    assert array.nbytes == sent.nbytes
    array.setflags(write=False)  # as Ray's object store gives it
    with shared_files({"w": array, "t": as_array(sent.T)}, str(tmp_path)) as (path,):
        got = load_torch_file(path)
    assert got["w"].dtype == dtype and torch.equal(got["w"], sent) and torch.equal(got["t"], sent.T)
    assert tensor_digest(array) == tensor_digest(got["w"].view(torch.uint8).numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-expert FlexOlmo, far enough from initialisation for errors to show."""
    from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}  # vLLM's CPU needs 32 wide ones
    experts = {"num_hidden_layers": 2, "num_experts": 2, "num_experts_per_tok": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = FlexOlmoConfig(**sizes, **heads, **experts, **special)
    path = tmp_path_factory.mktemp("flex")
    FlexOlmoForCausalLM(config).save_pretrained(path)
    rng = np.random.default_rng(0)
    tensors = load_file(path / "model.safetensors")
    write(path, {name: redrawn(name, array, rng) for name, array in tensors.items()})
    return path


def redrawn(name: str, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(array.shape, dtype=np.float32)
    return 1 + 0.2 * noise if "norm" in name else noise * (0.3 if ".gate." in name else 0.1)


def write(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def engine(cluster: None, folder: Path) -> Iterator[ActorHandle]:
    actor = ray.remote(RolloutEngine).options(num_cpus=1).remote(str(folder), OPTIONS)
    ray.get(actor.health.remote(), timeout=DEADLINE_S)
    yield actor
    ray.kill(actor)


@pytest.fixture
def loaded(engine: ActorHandle, folder: Path) -> ActorHandle:
    """The engine with the folder's weights, whatever the test before pushed."""
    call(engine.update_weights.remote(0, str(folder), fresh=True))
    return engine


def call(ref: ray.ObjectRef | list[ray.ObjectRef]) -> object:
    return ray.get(ref, timeout=DEADLINE_S)


def expected_logprobs(
    folder: Path, tensors: Tensors, sequences: list[list[int]], lengths: list[int]
) -> list[list[float]]:
    """What transformers says in fp32."""
    from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

    named = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    config = FlexOlmoConfig.from_dict(json.loads((folder / "config.json").read_text()))
    model = FlexOlmoForCausalLM.from_pretrained(None, config=config, state_dict=named).eval()
    results = []
    for tokens, start in zip(sequences, lengths, strict=True):
        ids_BT = torch.tensor([tokens])
        with torch.no_grad():
            logprobs_TV = model(ids_BT).logits[0].log_softmax(-1)
        results.append([float(logprobs_TV[i - 1, tokens[i]]) for i in range(start, len(tokens))])
    return results


def random_sequences(count: int = 6) -> tuple[list[list[int]], list[int]]:
    rng = np.random.default_rng(1)
    lengths = [int(n) for n in rng.integers(1, 20, count)]
    return [rng.integers(0, VOCAB, n + 30).tolist() for n in lengths], lengths


def gap(engine: ActorHandle, folder: Path, tensors: Tensors) -> float:
    """The largest difference of log-probabilities; infinite for a NaN."""
    sequences, lengths = random_sequences()
    found = call(engine.logprobs.remote(sequences, lengths))
    difference = np.array(found) - expected_logprobs(folder, tensors, sequences, lengths)
    return float(np.abs(np.nan_to_num(difference, nan=np.inf)).max())


def sampled_gap(engine: ActorHandle, folder: Path, tensors: Tensors, version: int) -> float:
    """The same for what the engine says of the tokens it samples."""
    prompts = [[5, 6, 7], [8, 9]]
    groups = call(engine.generate.remote(prompts, Sampling(n=2, max_tokens=20)))
    samples = [sample for group in groups for sample in group]
    assert all(sample.spans == [(version, 0, len(sample.token_ids))] for sample in samples)
    starts = [prompt for prompt in prompts for _ in range(2)]
    sequences = [p + s.token_ids for p, s in zip(starts, samples, strict=True)]
    expected = expected_logprobs(folder, tensors, sequences, [len(p) for p in starts])
    return float(np.abs(np.array([s.logprobs for s in samples]) - expected).max())


@pytest.mark.slow
def test_engine_agrees_with_transformers(loaded: ActorHandle, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert gap(loaded, folder, tensors) < TOLERANCE
    assert sampled_gap(loaded, folder, tensors, 0) < TOLERANCE


@pytest.mark.slow
def test_pushes_of_changed_layers(loaded: ActorHandle, folder: Path) -> None:
    """Three pushes in a row of what RLVR trains, each leaving most of the anchor's layers alone."""
    tensors = load_file(folder / "model.safetensors")
    trained = ("experts.1.", "mlp.gate.", "q_proj", "k_proj", "v_proj", "embed", "lm_head")
    only_last_layer = ("layers.1.mlp.experts.1.", "layers.1.self_attn.q_proj", "norm")
    rng = np.random.default_rng(2)
    for version, roles in enumerate((trained, only_last_layer, trained), start=1):
        before = dict(tensors)
        changed = {name for name in tensors if any(role in name for role in roles)}
        tensors |= {name: redrawn(name, tensors[name], rng) for name in changed}
        assert gap(loaded, folder, tensors) > 0.1
        pushed = {name: tensors[name] for name in complete_layers(changed, tensors)}
        call(loaded.update_weights.remote(version, ray.put(pushed)))
        assert gap(loaded, folder, tensors) < TOLERANCE
        assert sampled_gap(loaded, folder, tensors, version) < TOLERANCE
        assert gap(loaded, folder, before) > 0.1
    assert call(loaded.health.remote()).weight_version == 3


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["left out", "stale"])
@pytest.mark.parametrize(
    "victim", ["layers.0.mlp.experts.0.up_proj", "layers.1.self_attn.k_proj", "lm_head"]
)
def test_a_bad_push_shows(loaded: ActorHandle, folder: Path, fault: str, victim: str) -> None:
    """What the canary has to catch, and that a full push mends it."""
    old = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(3)
    new = {name: redrawn(name, array, rng) for name, array in old.items()}
    pushed = dict(new)
    name = f"{'' if victim == 'lm_head' else 'model.'}{victim}.weight"
    if fault == "left out":
        del pushed[name]
    else:
        pushed[name] = old[name]
    call(loaded.update_weights.remote(1, pushed))
    assert gap(loaded, folder, new) > 0.1

    digests = call(loaded.checksums.remote())
    assert {n for n, array in new.items() if digests[n] != tensor_digest(array)} == {name}

    call(loaded.update_weights.remote(2, new, fresh=True))
    assert gap(loaded, folder, new) < TOLERANCE
    assert sampled_gap(loaded, folder, new, 2) < TOLERANCE


@pytest.mark.slow
def test_a_fresh_push_cures_a_poisoned_cache(loaded: ActorHandle, folder: Path) -> None:
    """NaNs in the key-value cache outlive the weights that made them."""
    good = load_file(folder / "model.safetensors")
    qkv = complete_layers({"model.layers.0.self_attn.v_proj.weight"}, good)
    prompts, sampling = [[token] for token in range(64)], Sampling(max_tokens=20)

    def num_broken() -> int:
        groups = call(loaded.generate.remote(prompts, sampling))
        return sum(not np.isfinite(samples[0].logprobs).all() for samples in groups)

    assert num_broken() == 0
    call(loaded.update_weights.remote(1, {name: good[name] * np.float32("nan") for name in qkv}))
    assert num_broken() == 64
    call(loaded.update_weights.remote(2, good))
    assert num_broken() > 0, "if vLLM masks such pages now, `fresh` has lost its reason"
    call(loaded.update_weights.remote(3, good, fresh=True))
    assert num_broken() == 0
    assert gap(loaded, folder, good) < TOLERANCE


@pytest.mark.slow
def test_requests_in_flight_survive_an_update(loaded: ActorHandle, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    prompts = [[token, 3] for token in range(96)]  # more than run at once
    running = loaded.generate.remote(prompts, Sampling(max_tokens=200))
    time.sleep(0.5)
    assert call(loaded.health.remote()).num_unfinished > 0
    update = loaded.update_weights.remote(1, {"lm_head.weight": tensors["lm_head.weight"] * 2})
    call([loaded.health.remote() for _ in range(20)])  # an update under way is no fault
    call(update)
    assert call(loaded.health.remote()).num_unfinished > 0, "the update came too late to matter"
    later = loaded.generate.remote(prompts[:2], Sampling(max_tokens=2))

    groups = call(running)
    assert [len(samples[0].token_ids) for samples in groups] == [200] * 96
    assert {samples[0].finish_reason for samples in groups} == {"length"}
    spans = [samples[0].spans for samples in groups]
    assert all(span[0][1] == 0 and span[-1][2] == 200 for span in spans), "every token has one"
    assert [(0, 0, 200)] not in spans[-1:], "the last ones were drawn by both"
    assert any(len(span) == 2 and span[0][2] == span[1][1] for span in spans)
    assert {samples[0].spans[0] for samples in call(later)} == {(1, 0, 2)}


@pytest.mark.slow
def test_sampling(loaded: ActorHandle) -> None:
    prompts = [[5, 6, 7], [5, 6, 7]]
    seeded = Sampling(n=3, max_tokens=10, seed=11)
    first, again = (call(loaded.generate.remote(prompts, seeded)) for _ in range(2))
    drawn = [s.token_ids for group in first for s in group]
    assert drawn == [s.token_ids for group in again for s in group]
    assert len({tuple(tokens) for tokens in drawn}) == 6, "each completion has a seed of its own"

    stops = tuple(range(0, VOCAB, 2))
    ((sample,),) = call(
        loaded.generate.remote([[5]], Sampling(max_tokens=90, stop_token_ids=stops))
    )
    assert sample.finish_reason == "stop"
    assert sample.token_ids[-1] in stops
    assert len(sample.logprobs) == len(sample.token_ids)


@pytest.mark.slow
def test_a_failed_push_fails_the_engine(cluster: None, folder: Path) -> None:
    """Half an update must never generate; shutting down leaves nothing behind."""
    actor = ray.remote(RolloutEngine).options(num_cpus=1).remote(str(folder), OPTIONS)
    running = actor.generate.remote([[5]] * 64, Sampling(max_tokens=250))
    with pytest.raises(ray.exceptions.RayTaskError):
        call(actor.update_weights.remote(1, {"no.such.weight": np.ones((2, 2), np.float32)}))
    for refused in (running, actor.generate.remote([[5]], Sampling()), actor.health.remote()):
        with pytest.raises(RuntimeError, match="replace the engine"):
            call(refused)
    call(actor.shutdown.remote())
    ray.kill(actor)


@pytest.mark.slow
def test_engine_with_processes(cluster: None, folder: Path, tmp_path: Path) -> None:
    """The arrangement for GPUs: core and workers in processes of their own, which all end."""
    tensors = load_file(folder / "model.safetensors")
    options = EngineOptions(max_model_len=256, kv_cache_bytes=64 << 20, in_process=False)
    actor = ray.remote(RolloutEngine).options(num_cpus=1).remote(str(folder), options)
    processes = [psutil.Process(pid) for pid in call(actor.health.remote()).process_ids]
    assert processes
    assert gap(actor, folder, tensors) < TOLERANCE
    new = {name: array * np.float32(1.5) for name, array in tensors.items()}
    shutil.copy(folder / "config.json", tmp_path)
    write(tmp_path, new)
    call(actor.update_weights.remote(1, str(tmp_path)))
    assert gap(actor, folder, new) < TOLERANCE
    call(actor.shutdown.remote())
    assert not [process for process in processes if process.is_running()]
    ray.kill(actor)
