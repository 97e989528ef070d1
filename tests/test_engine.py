"""The training engine: real DeepSpeed on gloo."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bar_ray.cost import Shape
from bar_ray.data.batches import MicroBatch
from bar_ray.model import freeze, fused, tensors
from bar_ray.recipe import ROLES, Learn, Run, Stage
from bar_ray.train.eight_bit import parts_of
from bar_ray.train.engine import Engine
from bar_ray.train.loss import language_model_loss
from bar_ray.types import UserError


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("dist") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # Ray Train sets it for its workers
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def engine(
    folder: Path,
    learn: Learn,
    zero_stage: int = 0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Engine:
    run = Run(zero_stage=zero_stage, micro_batch=2)
    stage = Stage(**{"lr": 0.05, **settings}, schedule="linear", learn=learn, run=run)
    return Engine(fused.load(folder, dtype), stage, num_steps=8)


def train(engine: Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 40, (4, 12), generator=generator)
        positions = torch.arange(12).expand(4, -1)
        whole = MicroBatch(tokens, (positions > 0).long(), positions)
        parts = [
            MicroBatch(
                *(getattr(whole, f)[i : i + 2] for f in ("tokens_MS", "loss_MS", "positions_MS"))
            )
            for i in (0, 2)
        ]
        loss = engine.forward_backward(
            parts, lambda part: language_model_loss(engine.model, part, 44, 48, 0.0)
        )
        engine.optim_step()
        losses.append(loss["loss"])
    return losses


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter; under ZeRO 3 the model itself holds parts."""
    state = {}
    for name, parameter in engine.model.named_parameters():
        with engine._gathered(parameter):
            state[name] = parameter.detach().clone()
    return state


@pytest.mark.parametrize("role", ROLES)
def test_one_step_moves_exactly_the_role_of_the_freeze_table(small_moe: Path, role: str) -> None:
    run = engine(small_moe, Learn(**{role: 1.0}))
    before = state(run)
    train(run, range(1))
    moved = {n for n, value in state(run).items() if not torch.equal(value, before[n])}
    assert moved == {name for name in before if tensors.role_of(name) == role}


def test_frozen_tensors_have_no_gradient_and_no_optimizer_state(small_moe: Path) -> None:
    run = engine(small_moe, Learn(expert=1.0, router=1.0))
    train(run, range(1))
    for name, parameter in run.model.named_parameters():
        learns = tensors.role_of(name) in ("expert", "router")
        assert (parameter in run.optimizer.state) is learns, name
        assert parameter.requires_grad is learns, name


def test_learning_rate_follows_role_and_schedule(small_moe: Path) -> None:
    run = engine(small_moe, Learn(expert=1.0, lm_head=0.1))
    train(run, range(2))
    rates = {group["scale"]: group["lr"] for group in run.optimizer.param_groups}
    assert rates[1.0] == pytest.approx(0.05 * 7 / 8) and rates[0.1] == pytest.approx(
        0.1 * rates[1.0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_continuing_from_a_checkpoint_is_bitwise_the_same(
    small_moe: Path, tmp_path: Path, zero_stage: int, dtype: torch.dtype
) -> None:
    learn = Learn(expert=1.0, router=1.0, embedding=0.1, attention=1.0)
    straight = engine(small_moe, learn, zero_stage, dtype)
    losses = train(straight, range(6))
    first = engine(small_moe, learn, zero_stage, dtype)
    train(first, range(3))
    (tmp_path / "checkpoint").mkdir()
    first.save(tmp_path / "checkpoint", {"cursor": 3})
    second = engine(small_moe, learn, zero_stage, dtype)
    assert second.load(tmp_path / "checkpoint") == {"cursor": 3, "step": 3}
    assert train(second, range(3, 6)) == losses[3:]
    for name, value in state(straight).items():
        assert torch.equal(value, state(second)[name]), name


def test_learning_lowers_the_loss(small_moe: Path) -> None:
    run = engine(small_moe, Learn(expert=1.0, attention=1.0, embedding=1.0, lm_head=1.0))
    losses = [train(run, range(1))[0] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_checkpoint_holds_only_what_learns(small_moe: Path, tmp_path: Path) -> None:
    run = engine(small_moe, Learn(expert=1.0))
    train(run, range(1))
    run.save(tmp_path, {})
    names = set(freeze.trainable(run.model))
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "weights.safetensors")) == names
    assert {tensors.role_of(name) for name in names} == {"expert"}


def kept(folder: Path, again: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes kept for the backward pass beside weights, and the gradients."""
    run = Run(micro_batch=8, activation_checkpointing=again)
    model = fused.load(folder, torch.float32)
    made = Engine(model, Stage(learn=Learn(expert=1.0, attention=1.0), run=run), num_steps=1)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            sizes[place] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(0, 40, (8, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(64).expand(8, -1)
    batch = MicroBatch(tokens, (positions > 0).long(), positions)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = language_model_loss(made.model, batch, 504, 512, 0.0)
    loss.backward()
    return sum(sizes.values()), {n: p.grad for n, p in freeze.trainable(model).items()}


def test_recomputed_activations_are_not_kept(larger_moe: Path) -> None:
    (whole, expected), (little, found) = kept(larger_moe, False), kept(larger_moe, True)
    assert little < whole / 3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


# --- 8-bit states ---------------------------------------------------------------------------------

ALL = Learn(**dict.fromkeys(ROLES, 1.0))


@pytest.fixture
def torchao() -> None:
    pytest.importorskip("torchao", reason="the extra eight_bit is not installed")


def eight_bit(folder: Path, learn: Learn = ALL, **settings: Any) -> Engine:
    settings = {"lr": 0.01, "optimizer": "adamw_8bit", **settings}
    return engine(folder, learn, dtype=torch.bfloat16, **settings)


def test_without_torchao_it_says_what_to_install(
    larger_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"pip install 'bar_ray\[eight_bit\]'"):
        eight_bit(larger_moe)


@pytest.mark.usefixtures("torchao")
def test_eight_bit_states_learn_as_fp32_ones_do(larger_moe: Path) -> None:
    """The same schedule with exact moments and weights: the losses follow each other."""
    exact, small = engine(larger_moe, ALL, lr=0.01), eight_bit(larger_moe)
    expected = [train(exact, range(1))[0] for _ in range(8)]
    losses = [train(small, range(1))[0] for _ in range(8)]
    assert expected[-1] < 0.6 * expected[0]
    assert losses == pytest.approx(expected, rel=0.1)


@pytest.mark.usefixtures("torchao")
def test_small_updates_are_not_lost(larger_moe: Path) -> None:
    """Steps of a 30th of a bf16 digit would all round to nothing; at random, their sum is kept."""
    run = eight_bit(larger_moe, Learn(lm_head=1.0), lr=1e-4)
    [weight] = freeze.trainable(run.model).values()
    with torch.no_grad():
        weight.fill_(1.0)  # the next number below is 1 - 2^-8
    gradient = torch.ones_like(weight)
    for _ in range(4):  # under Adam each moves a weight by the learning rate
        weight.grad = gradient.clone()
        run.optim_step()
    rates = [1e-4 * (1 - step / 8) for step in range(4)]
    moved = 1.0 - weight.float().mean().item()
    assert moved == pytest.approx(sum(rates), rel=0.25)
    assert {*weight.float().unique().tolist()} <= {1.0, 1 - 2**-8, 1 - 2**-7}


@pytest.mark.usefixtures("torchao")
def test_eight_bit_states_continue_bitwise(larger_moe: Path, tmp_path: Path) -> None:
    straight = eight_bit(larger_moe)
    losses = train(straight, range(6))
    first = eight_bit(larger_moe)
    assert train(first, range(3)) == losses[:3]
    first.save(tmp_path, {"cursor": 3})
    second = eight_bit(larger_moe)
    assert second.load(tmp_path) == {"cursor": 3, "step": 3}
    assert train(second, range(3, 6)) == losses[3:]
    for name, value in state(straight).items():
        assert torch.equal(value, state(second)[name]), name


@pytest.mark.usefixtures("torchao")
def test_a_checkpoint_before_the_first_update(larger_moe: Path, tmp_path: Path) -> None:
    first = eight_bit(larger_moe)
    first.skip_step()
    first.save(tmp_path, {})
    second = eight_bit(larger_moe)
    assert second.load(tmp_path) == {"step": 1}
    first.skip_step(), second.skip_step()
    assert train(second, range(2)) == train(first, range(2))


@pytest.mark.usefixtures("torchao")
def test_eight_bit_states_take_what_the_plan_says(larger_moe: Path) -> None:
    run = eight_bit(larger_moe, Learn(expert=1.0))
    train(run, range(1))
    held = 0
    for weight in freeze.trainable(run.model).values():
        for moment in ("exp_avg", "exp_avg_sq"):
            held += sum(
                part.numel() * part.element_size()
                for part in parts_of(run.optimizer.state[weight][moment]).values()
            )
    shape = Shape.of(run.model.config.to_dict())
    known = shape.memory(run.stage.learn, run.stage.run, 12, "bfloat16", optimizer="adamw_8bit")
    assert held == known.optimizer


# --- another number of workers -------------------------------------------------------------------

RESIZED = ((2, range(0, 2)), (1, range(2, 4)), (3, range(4, 6)))  # (workers, steps)
LEARN = Learn(expert=1.0, router=1.0, embedding=0.1, attention=1.0)


def train_globally(run: Engine, steps: range) -> list[float]:
    """Six rows a step whatever the number of workers; each rank takes its share of them."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in steps:
        tokens = torch.randint(0, 40, (6, 12), generator=torch.Generator().manual_seed(step))
        mine = tokens[rank * 6 // world : (rank + 1) * 6 // world]
        positions = torch.arange(12).expand(len(mine), -1)
        part = MicroBatch(mine, (positions > 0).long(), positions)
        found = run.forward_backward(
            [part], lambda part: language_model_loss(run.model, part, 66, 72, 0.0)
        )
        losses.append(found["loss"])
        run.optim_step()
    return losses


def work(rank: int, world: int, steps: range, model: Path, folder: Path) -> None:
    """Continue each ZeRO stage from its checkpoint, and leave losses and weights in `folder`."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    store = f"file://{folder}/store-{world}"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world)
    for zero_stage in (1, 2, 3):
        run, place = engine(model, LEARN, zero_stage), folder / f"zero-{zero_stage}"
        if steps.start:
            assert run.load(place / f"step-{steps.start}") == {"step": steps.start}
        losses = train_globally(run, steps)
        checkpoint = place / f"step-{steps.stop}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        run.save(checkpoint, {})
        weights = run.weights()
        if rank == 0:
            torch.save((losses, weights), checkpoint / "result.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_number_of_workers_may_change(small_moe: Path, tmp_path: Path) -> None:
    """2, then 1, then 3 workers, under ZeRO 1 to 3: as if there had always been one."""
    constant = engine(small_moe, LEARN)
    expected = train_globally(constant, range(6))
    for world, steps in RESIZED:
        torch.multiprocessing.spawn(work, (world, steps, small_moe, tmp_path), nprocs=world)
    for zero_stage in (1, 2, 3):
        place, losses = tmp_path / f"zero-{zero_stage}", []
        for _, steps in RESIZED:
            found, weights = torch.load(place / f"step-{steps.stop}" / "result.pt")
            losses += found
        assert losses == pytest.approx(expected, rel=1e-4)
        for name, value in constant.weights().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
