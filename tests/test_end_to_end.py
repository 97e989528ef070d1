"""The recipe on real parts: Ray, DeepSpeed, vLLM, the sandbox, S3; killed and continued.

Step counts are cut down until nothing is learned: what is checked here is that every part does its
work, not how good the models are (`make demo` shows that).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.fs
import pytest
import torch

from bar_ray import config, pipeline, registry, storage, subset
from bar_ray.data.mixture import Mixture
from bar_ray.model.tensors import Checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.late]
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for the reward in even.py

SHORT = (
    "tiny.pretrain.steps=12",
    "tiny.post_train.steps=6",
    *(f"experts.{domain}.midtrain.steps=4" for domain in ("math", "code")),
    *(f"experts.{domain}.sft.steps=12" for domain in ("math", "code", "tool_use", "safety")),
    "stages.rlvr.steps=4",
    "stages.rlvr.batch_size=4",
    "stages.rlvr.rollout.max_tokens=12",
    "router.steps=12",
    "evaluate.stages=[]",
    "evaluate.limit=6",
    "evaluate.max_tokens=12",
)
FREQUENT = (
    "stages.sft.run.checkpoint_every=3",
    "stages.rlvr.run.checkpoint_every=1",
    "router.run.checkpoint_every=3",
)


def command(job: str, store: str, *arguments: str) -> list[str]:
    return [
        sys.executable,
        f"jobs/{job}.py",
        "conf/tiny.yaml",
        f"storage={store}",
        *SHORT,
        *arguments,
    ]


def run(job: str, store: str, *arguments: str) -> str:
    done = subprocess.run(
        command(job, store, *arguments), capture_output=True, text=True, timeout=1400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def built(store: str, *overrides: str) -> pipeline.Pipeline:
    return pipeline.build(config.load("conf/tiny.yaml", [f"storage={store}", *SHORT, *overrides]))


# --- the whole pipeline on an S3-protocol server -----------------------------------------------


ONLY_CODE = ("experts.math=null", "experts.tool_use=null", "experts.safety=null")
TWO_EXPERTS = ("experts.math=null", "experts.tool_use=null")  # code and safety: every verb


@pytest.fixture(scope="module")
def finished(s3: str) -> tuple[str, str]:
    """Storage and console output of a whole run."""
    store = f"s3://bkt/run{s3}"
    return store, run("train_all", store, *TWO_EXPERTS)


def test_whole_recipe_on_object_storage(finished: tuple[str, str]) -> None:
    store, output = finished
    graph = built(store, *TWO_EXPERTS)
    for step in (*graph.targets, *graph.experts.values(), graph.merged):
        storage.verify(step.artifact.uri)
    scores = storage.read_json(storage.join(store, "report", "scores.json"))["models"]
    assert set(scores) == {"base", "code rlvr", "safety sft", "merged", "bar"}
    assert all(
        set(s) == {*("general", "math", "code"), *("tool_use", "safety", "overall")}
        for s in scores.values()
    )
    page = storage.read_bytes(storage.join(store, "report", "report.html")).decode()
    assert "</html>" in page
    assert "overall" in output
    code = storage.read_json(storage.join(store, "experts", "code.json"))
    assert code[-1]["fingerprint"] == graph.experts["code"].fingerprint
    assert code[-1]["scores"]["overall"] == scores["code rlvr"]["overall"]


def test_exported_model_agrees_in_transformers_and_vllm(finished: tuple[str, str]) -> None:
    store, _ = finished
    folder = storage.fetch(storage.join(store, "model"))
    assert "FlexOlmoForCausalLM" in Path(folder, "README.md").read_text()
    agree(folder)


def agree(folder: str) -> None:
    """Hugging Face and vLLM load a folder as it is, and say the same."""
    tokens = [5, 9, 13, 21, 8, 30, 17, 6, 40, 11, 25, 7]
    ours = hugging_face_logprobs(folder, tokens)
    theirs = json.loads(
        subprocess.run(
            [sys.executable, "-c", VLLM_LOGPROBS, folder, json.dumps(tokens)],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout.splitlines()[-1]
    )
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-3


VLLM_LOGPROBS = """
import json, os, sys
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True,
          kv_cache_memory_bytes=2**26, max_num_seqs=4)
tokens = json.loads(sys.argv[2])
params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
output = llm.generate([{"prompt_token_ids": tokens}], params)[0]
print(json.dumps([output.prompt_logprobs[i][tokens[i]].logprob for i in range(1, len(tokens))]))
"""


def hugging_face_logprobs(folder: str, tokens: list[int]) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)
    return [float(logprobs[i - 1, tokens[i]]) for i in range(1, len(tokens))]


def test_the_same_command_again_reuses_everything(finished: tuple[str, str]) -> None:
    store, _ = finished
    before = manifests(store)
    started = time.monotonic()
    output = run("train_all", store, *TWO_EXPERTS)
    assert "0 to run, " in output and "  run    " not in output
    assert time.monotonic() - started < 60
    assert manifests(store) == before


def test_a_checkpoint_can_be_scored_alone(finished: tuple[str, str]) -> None:
    store, _ = finished
    assert "0 to run" in run("evaluate", store, "--model", "code rlvr", "--plan", *TWO_EXPERTS)
    output = run("evaluate", store, "--checkpoint", storage.join(store, "model"), *TWO_EXPERTS)
    assert "2 to run, 1 reused" in output and "ran 2 steps" in output


def test_an_expert_is_removed_and_comes_back(finished: tuple[str, str]) -> None:
    store, _ = finished
    first = registry.latest(store, registry.MODEL, registry.MODELS)
    assert first.fingerprint == built(store, *TWO_EXPERTS).bar.fingerprint
    assert first.experts == {"code": 1, "safety": 1}
    before = manifests(store)
    output = run("upgrade", store, "--remove", "safety", *TWO_EXPERTS)
    assert "within noise" in output and "trained for this" in output and "version 2" in output
    after = manifests(store)
    added = {place.split("/")[-3] for place in after.keys() - before.keys()}
    assert before.items() <= after.items(), "every other artifact keeps its bytes"
    assert added <= {"merge", "sample", "tokenise", "route", "evaluate"}
    second = registry.latest(store, registry.MODEL, registry.MODELS)
    assert (second.version, second.experts) == (2, {"code": 1})
    assert exported(store) == second.fingerprint
    back = run("upgrade", store, "--rollback", *TWO_EXPERTS)
    assert "0 to run" in back and "trained for this: nothing" in back
    assert registry.latest(store, registry.MODEL, registry.MODELS).version == first.version
    assert exported(store) == first.fingerprint and manifests(store) == after


def test_stock_lm_eval_agrees_on_every_item(finished: tuple[str, str], tmp_path: Path) -> None:
    """The card's command, on Hugging Face's model, against what vLLM answered here."""
    store, _ = finished
    scored = built(store, *TWO_EXPERTS).scores["bar"].artifact
    lines = Path(storage.fetch(scored.uri), "samples.jsonl").read_text().splitlines()
    ours = {(each["category"], each["id"]): each for each in map(json.loads, lines)}
    arguments = "run --model hf --model_args pretrained=..,dtype=float32,add_bos_token=False"
    arguments += " --device cpu --include_path . --tasks bar --log_samples --output_path"
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments.split(), str(tmp_path / "results.json")],
        cwd=Path(storage.fetch(storage.join(store, "model")), "lm_eval"),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=600,
    )
    theirs = {}
    for file in tmp_path.glob("samples_bar_*.jsonl"):
        category = file.name.removeprefix("samples_bar_").rpartition("_")[0]
        for each in map(json.loads, file.read_text().splitlines()):
            theirs[category, each["doc"]["id"]] = each
    assert theirs.keys() == ours.keys() and len(ours) == 30
    assert all(each["score"] == ours[item]["score"] for item, each in theirs.items())
    said = {item: each["resps"][0][0].strip() for item, each in theirs.items()}
    other = [item for item, text in said.items() if text != ours[item]["completion"]]
    assert len(other) <= 1, f"more than a tie between two tokens: {other}"


def test_a_part_of_the_model_is_served_without_training(finished: tuple[str, str]) -> None:
    """It equals the model merged from the same artifacts without the expert, but for the router."""
    store, _ = finished
    output = run("export", store, "--without", "safety", *TWO_EXPERTS)
    assert "copy s3://bkt/run/subsets/code/" in output and "then: vllm serve FOLDER" in output
    folder = storage.fetch(storage.join(store, "subsets", "code"))
    assert "safety was left out without any training" in Path(folder, "README.md").read_text()
    recipe = config.load("conf/tiny.yaml", [f"storage={store}", *SHORT, *TWO_EXPERTS])
    found = subset.work_out(recipe, without=["safety"])
    model, merged, whole = (
        Checkpoint(storage.fetch(place))
        for place in (
            storage.join(store, "subsets", "code"),
            found.pipeline.merged.artifact.uri,
            storage.join(store, found.model.artifact),
        )
    )
    assert model.names == merged.names
    for name in model.names:
        is_router = name.endswith("mlp.gate.weight")
        assert torch.equal(model[name], whole[name][:2] if is_router else merged[name]), name
    agree(folder)


def exported(store: str) -> str:
    return storage.read_manifest(storage.join(store, "model")).info["fingerprint"]


def manifests(store: str) -> dict[str, str]:
    """Artifact -> hash of its files."""
    found = storage.list_files(storage.join(store, "artifacts"), recursive=True)
    places = [uri.replace("/MANIFEST.json", "") for uri in found if "MANIFEST.json" in uri]
    return {place: storage.read_manifest(place).sha256 for place in places}


# --- killed and continued ------------------------------------------------------------------------

WITHOUT_RLVR = ("experts.code.rlvr=null", *ONLY_CODE, *FREQUENT)


def end_after_a_checkpoint(
    verb: str, job: str, store: str, *arguments: str, by: signal.Signals = signal.SIGKILL
) -> None:
    """Start a job, wait for a checkpoint of a stage, end the driver: nothing may be left."""
    with subprocess.Popen(
        command(job, store, *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as driver:
        deadline = time.monotonic() + 600
        while not list(Path(store, "checkpoints", verb).glob("*/*/*/MANIFEST.json")):
            assert driver.poll() is None, "the driver ended before it could be killed"
            assert time.monotonic() < deadline, f"no checkpoint of {verb}"
            time.sleep(0.1)
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(by)
        _, message = driver.communicate(timeout=60)
    if by == signal.SIGTERM:  # what `ray job stop` sends
        assert (driver.returncode, "the same command continues" in message) == (130, True), message
    require_gone(started)


def require_gone(processes: list[psutil.Process]) -> None:
    """Nothing outlives the driver that started it."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    # Ray's own two agents of a node take some minutes to notice that their raylet is gone.
    left = [p for p in alive if p.name() not in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="module")
def straight(finished: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Storage of an uninterrupted run of one expert without RLVR; it reuses the whole run's work,
    copied from S3 as a user would copy it."""
    store = str(tmp_path_factory.mktemp("kill") / "straight")
    filesystem, artifacts = storage.resolve(storage.join(finished[0], "artifacts"))
    pyarrow.fs.copy_files(artifacts, f"{store}/artifacts", source_filesystem=filesystem)
    for verb in ("rlvr", "merge", "route", "evaluate"):
        shutil.rmtree(Path(store, "artifacts", verb))
    output = run("train_router", store, *WITHOUT_RLVR)
    verbs = [line.split()[1] for line in output.splitlines() if line.startswith("  run ")]
    assert {"merge", "route"} <= {*verbs} <= {"merge", "route", "sample", "tokenise"}
    return store


def test_killed_driver_continues_to_bitwise_the_same_model(straight: str, tmp_path: Path) -> None:
    killed = str(tmp_path / "killed")
    shutil.copytree(straight, killed)
    for verb in ("sft/code", "merge", "route"):
        shutil.rmtree(Path(killed, "artifacts", verb))
    for verb, by in (("sft", signal.SIGKILL), ("route", signal.SIGTERM)):
        end_after_a_checkpoint(verb, "train_router", killed, *WITHOUT_RLVR, by=by)
    output = run("train_router", killed, *WITHOUT_RLVR)
    assert "continues at step" in output
    for step in (s for s in built(killed, *WITHOUT_RLVR).bar.inputs.values()):
        storage.verify(step.artifact.uri)
    ours = {place.removeprefix(killed): sha for place, sha in manifests(killed).items()}
    theirs = {place.removeprefix(straight): sha for place, sha in manifests(straight).items()}
    assert ours == theirs
    assert not list(Path(killed, "checkpoints").glob("*/*/*/step-*")), "checkpoints are cleared"


def easily_rewarded(folder: Path) -> tuple[str, ...]:
    """RLVR prompts whose reward an untrained model sometimes gets: else there is no signal."""
    message = {"role": "user", "content": "Say something."}
    for name in ("train", "held_out"):
        rows = [
            {
                "id": f"{name}-{n}",
                "verifier": "even:grade",
                "ground_truth": n,
                "messages": [message],
            }
            for n in range(30)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        f"datasets.code_rlvr={folder}/train.jsonl",
        f"datasets.code_held_out={folder}/held_out.jsonl",
    )


def test_recorded_rollouts_train_bitwise_the_same_model_after_a_kill(
    straight: str, tmp_path: Path
) -> None:
    """Sampling is replaced by what an earlier run kept, so only the learner is left."""
    kept, killed = str(tmp_path / "kept"), str(tmp_path / "killed")
    shutil.copytree(straight, kept)
    overrides = (*ONLY_CODE, *FREQUENT, *easily_rewarded(tmp_path))
    output = run("rollouts", kept, "--expert", "code", "--steps", "4", *overrides)
    [page] = Path(kept).glob("artifacts/rollouts/code/*/transcripts.html")
    assert str(page) in output and "reward 1.00 (right)" in page.read_text()
    replay = f"experts.code.rlvr.replay={page.parent}"
    shutil.copytree(kept, killed)
    run("merge", kept, *overrides, replay)
    end_after_a_checkpoint("rlvr", "merge", killed, *overrides, replay)
    assert "continues at step" in run("merge", killed, *overrides, replay)
    ours, theirs = (
        {p.removeprefix(s): sha for p, sha in manifests(s).items() if "/rlvr/" in p or "merge" in p}
        for s in (killed, kept)
    )
    assert ours == theirs and any("/rlvr/" in place for place in ours)
    rlvr = built(kept, *overrides, replay).experts["code"]
    before, after = (
        Checkpoint(storage.fetch(step.artifact.uri)) for step in (rlvr.inputs["model"], rlvr)
    )
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert not torch.equal(before[name], after[name]), "nothing was learned: the test says nothing"


ASYNCHRONOUS = (
    "stages.rlvr.steps=20",
    "stages.rlvr.max_staleness=2",
    "stages.rlvr.run.num_workers=2",
    "stages.rlvr.rollout.num_engines=2",
    "stages.rlvr.rollout.cpus_per_engine=0.25",
    "experts.code.rlvr.held_out_every=10",
    "experts.code.rlvr.keep=best",
)


RLVR_METRICS = (
    *("reward", "reward/code_rlvr", "staleness", "staleness_max", "importance", "importance_max"),
    *("importance_capped", "gap", "entropy", "truncated", "zero_variance", "outcome/right"),
    *("outcome/wrong", "outcome/timeout", "outcome/crash", "outcome/unparsable", "sync_s"),
    *("sync_mb", "canary_gap", "generate_s", "engines_idle", "rollout_tokens"),
)


NOTICED = {
    "RolloutEngine": "engine_lost",
    "SamplerActor": "sampler_lost",
    "RayTrainWorker": "resumed",
}


def test_rlvr_survives_the_loss_of_each_of_its_processes(straight: str, tmp_path: Path) -> None:
    """An engine, the sampler, the learner and the driver are killed in turn."""
    store = str(tmp_path / "faults")
    shutil.copytree(straight, store)
    overrides = (*ONLY_CODE, *FREQUENT, *ASYNCHRONOUS, *easily_rewarded(tmp_path))
    with subprocess.Popen(command("merge", store, *overrides), stdout=subprocess.DEVNULL) as driver:
        for name, event in NOTICED.items():
            wait_for_new_checkpoint(store, "rlvr", driver)
            processes_called(driver.pid, name)[0].kill()
            wait_for_event(store, event, driver)
        wait_for_new_checkpoint(store, "rlvr", driver)
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    require_gone(started)
    assert "continues at step" in run("merge", store, *overrides)
    rlvr = built(store, *overrides).experts["code"]
    folder = Path(storage.fetch(rlvr.artifact.uri))
    consumed = json.loads((folder / "consumed.json").read_text())
    stage = rlvr.settings["stage"]
    by_place = {each["place"]: each["prompt_id"] for step in consumed for each in step}
    assert sum(map(len, consumed)) == len(by_place), "no prompt twice"
    planned = Mixture([30], [1.0], stage.steps * stage.batch_size, seed=0).row
    assert by_place == {place: f"train-{row}" for place, row in enumerate(planned)}
    scores = json.loads((folder / "held_out.json").read_text())
    assert set(scores["by_step"]) == {"10", "20"}
    events = [record["event"] for record in recorded(store, "events.jsonl")]
    assert events.count("resumed") >= 2, "the driver was killed too late"
    rows = [row for row in recorded(store, "metrics.jsonl") if row["verb"] == "rlvr"]
    assert max(row["staleness_max"] for row in rows) <= 2
    learned = [row for row in rows if "loss" in row]  # groups of equal rewards push nothing
    assert any(row["zero_variance"] < 1 for row in learned), "there was something to learn"
    assert max(row["canary_gap"] for row in learned) < 1e-3
    assert {*RLVR_METRICS} <= {name for row in rows for name in row}


def recorded(store: str, name: str) -> list[dict]:
    """What the runs of a storage wrote; a kill may have cut a last line off."""
    texts = [path.read_text() for path in Path(store, "runs").glob(f"*/{name}")]
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def newest_checkpoint(store: str, verb: str) -> int:
    pattern = f"checkpoints/{verb}/*/*/step-*/MANIFEST.json"
    steps = [int(p.parent.name.removeprefix("step-")) for p in Path(store).glob(pattern)]
    return max(steps, default=0)


def wait_for_new_checkpoint(store: str, verb: str, driver: subprocess.Popen) -> None:
    last = newest_checkpoint(store, verb)
    wait_for(f"checkpoint of {verb}", lambda: newest_checkpoint(store, verb) > last, driver)


def wait_for_event(store: str, event: str, driver: subprocess.Popen) -> None:
    """A loss that is noticed; one that is not, as another followed too soon, says nothing."""

    def happened() -> bool:
        return any(record["event"] == event for record in recorded(store, "events.jsonl"))

    wait_for(event, happened, driver)


def wait_for(what: str, happened: Callable[[], bool], driver: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        assert driver.poll() is None, f"the driver ended before there was a {what}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.1)


def processes_called(driver: int, name: str) -> list[psutil.Process]:
    """Ray's workers name themselves after what they run."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    assert found, f"no process of {name}"
    return found


# --- other families -------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), [("llama", "Mixtral"), ("qwen3", "Qwen3Moe")])
def test_other_families_go_through_the_whole_recipe(family: str, name: str, tmp_path: Path) -> None:
    """Every training of one expert; weights reach vLLM under the names it knows, or RLVR stops."""
    overrides = (f"tiny.family={family}", *ONLY_CODE)
    run("train_router", str(tmp_path), *overrides)
    graph = built(str(tmp_path), *overrides)
    assert graph.experts["code"].verb == "rlvr"
    storage.verify(graph.experts["code"].artifact.uri)
    folder = graph.bar.artifact.uri
    config_json = json.loads(Path(folder, "config.json").read_text())
    assert config_json["architectures"] == [f"{name}ForCausalLM"]
    agree(folder)
