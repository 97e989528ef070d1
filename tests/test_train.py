"""Losses, schedules, the policy loss and its advantages."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bar_ray.data.batches import MicroBatch
from bar_ray.model import experts, fused
from bar_ray.recipe import Grpo, Stage
from bar_ray.rollout.records import Trajectory
from bar_ray.stages import learner, lm
from bar_ray.train import grpo
from bar_ray.train.loss import language_model_loss, router_z, token_logprobs
from bar_ray.train.schedule import rate
from kernels import device


@pytest.fixture
def model(small_moe: Path) -> torch.nn.Module:
    return fused.load(small_moe, torch.float32)


def micro_batch(seed: int = 0, rows: int = 3, length: int = 12) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (rows, length), generator=generator)
    loss = torch.randint(0, 2, (rows, length), generator=generator)
    loss[:, 0] = 0
    positions = torch.arange(length).expand(rows, -1)
    return MicroBatch(tokens, loss, positions)


def test_token_logprobs_are_log_softmax_at_loss_places(model: torch.nn.Module) -> None:
    batch = micro_batch()
    reference = torch.log_softmax(model(batch.tokens_MS).logits.double() / 0.7, -1)
    wanted = [
        reference[m, s - 1, batch.tokens_MS[m, s]]
        for m in range(3)
        for s in range(12)
        if batch.loss_MS[m, s]
    ]
    ours, _ = token_logprobs(model, batch, temperature=0.7)
    assert torch.allclose(ours.double(), torch.stack(wanted), atol=1e-5)


def test_gradient_does_not_depend_on_micro_batches(model: torch.nn.Module) -> None:
    whole = micro_batch(rows=4)
    total, tokens = int(whole.loss_MS.sum()), whole.tokens_MS.numel()

    def gradient(size: int) -> torch.Tensor:
        model.zero_grad()
        for i in range(0, 4, size):
            part = MicroBatch(
                *(getattr(whole, f)[i : i + size] for f in ("tokens_MS", "loss_MS", "positions_MS"))
            )
            language_model_loss(model, part, total, tokens, 0.01)[0].backward()
        return model.lm_head.weight.grad.clone()

    assert torch.allclose(gradient(4), gradient(1), atol=1e-6)


def test_router_z_loss_is_the_mean_squared_logsumexp(model: torch.nn.Module) -> None:
    batch = micro_batch()
    with experts.router_logits(model) as blocks:
        token_logprobs(model, batch)
        expected = sum(torch.logsumexp(b.logits, -1).square().sum() for b in blocks) / 2
        assert torch.allclose(router_z(blocks), expected)
    assert all(block.logits is None for block in blocks), "kept logits would hold activations"


def test_schedules() -> None:
    assert rate(0, 100, "linear", 0.1) == pytest.approx(0.1)
    assert rate(9, 100, "linear", 0.1) == pytest.approx(1.0)
    assert rate(55, 100, "linear", 0.1) == pytest.approx(0.5)
    assert rate(55, 100, "cosine", 0.1) == pytest.approx(0.5)
    assert rate(99, 100, "constant", 0.0) == 1.0


def test_advantages() -> None:
    assert grpo.advantages([1, 0, 0, 1], "centred") == [0.5, -0.5, -0.5, 0.5]
    assert grpo.advantages([1, 0, 0, 1], "standardised") == pytest.approx([1, -1, -1, 1], abs=1e-4)
    assert grpo.advantages([1, 1, 1], "standardised") == [0, 0, 0]


def policy(
    current: list[float],
    old: list[float],
    engine: list[float],
    advantage: list[float],
    reference: list[float] | None = None,
    sequence: list[int] | None = None,
) -> grpo.PolicyTokens:
    """Tokens of the given probabilities, of one completion each, that weigh alike."""
    log = [torch.tensor(p, dtype=torch.float64).log() for p in (current, old, engine)]
    num = len(current)
    return grpo.PolicyTokens(
        log[0].requires_grad_(),
        *log[1:],
        torch.tensor(advantage, dtype=torch.float64),
        torch.full((num,), 1 / num, dtype=torch.float64),
        torch.tensor(sequence or list(range(num))),
        None if reference is None else torch.tensor(reference, dtype=torch.float64).log(),
    )


def value(loss: torch.Tensor) -> float:
    return float(loss.detach())


def test_policy_loss_by_hand() -> None:
    loss, about = grpo.policy_loss(policy([0.6], [0.5], [0.4], [1.0]), Grpo())
    assert value(loss) == pytest.approx(-(1.2 * 1.25))
    assert float(about["importance"]) == pytest.approx(1.25)
    assert float(about["ratio"]) == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("current", "advantage", "moves"),
    [(0.9, 1.0, False), (0.9, -1.0, True), (0.2, -1.0, False), (0.2, 1.0, True)],
)
def test_clipping_stops_the_gradient_only_outward(
    current: float, advantage: float, moves: bool
) -> None:
    tokens = policy([current], [0.5], [0.5], [advantage])
    loss, about = grpo.policy_loss(tokens, Grpo())
    loss.backward()
    assert bool(tokens.current.grad.abs() > 0) is moves
    assert bool(grpo.is_clipped(about["ratio"], tokens.advantage, Grpo())) is not moves


def test_importance_is_capped() -> None:
    tokens = policy([0.5], [0.5], [0.05], [1.0])
    assert value(grpo.policy_loss(tokens, Grpo(tis_cap=2.0))[0]) == pytest.approx(-2.0)
    assert value(grpo.policy_loss(tokens, Grpo(tis_cap=0.0))[0]) == pytest.approx(-1.0)


def test_gspo_has_one_ratio_per_completion() -> None:
    tokens = policy([0.6, 0.5, 0.9], [0.5, 0.5, 0.5], [0.5] * 3, [1, 1, -1], sequence=[0, 0, 1])
    loss, about = grpo.policy_loss(tokens, Grpo(objective="gspo", clip_low=1, clip_high=1))
    first = math.sqrt(0.6 / 0.5)
    assert about["ratio"].tolist() == pytest.approx([first, first, 1.8])
    assert value(loss) == pytest.approx(-(2 * first - 1.8) / 3)
    loss.backward()
    # d/dlogp of -w (2 s) with s = exp(mean of two differences): each token gets half of it
    assert tokens.current.grad.tolist() == pytest.approx([-first / 3, -first / 3, 1.8 / 3])


def test_cispo_clips_the_weight_and_never_the_gradient() -> None:
    tokens = policy([0.9, 0.6], [0.5, 0.5], [0.5, 0.5], [1.0, -1.0])
    grpo.policy_loss(tokens, Grpo(objective="cispo"))[0].backward()
    assert tokens.current.grad.tolist() == pytest.approx([-1.272 / 2, 1.2 / 2])


@pytest.mark.parametrize(
    ("estimator", "expected", "gradient"),
    [
        ("k1", math.log(2.0), 1.0),
        ("k2", math.log(2.0) ** 2 / 2, math.log(2.0)),
        ("k3", 0.5 - 1 + math.log(2.0), 0.5),
    ],
)
def test_kl_estimators(estimator: str, expected: float, gradient: float) -> None:
    tokens = policy([0.5], [0.5], [0.5], [0.0], reference=[0.25])
    loss, about = grpo.policy_loss(tokens, Grpo(kl=0.1, kl_estimator=estimator))
    assert float(about["kl"]) == pytest.approx(expected)
    assert value(loss) == pytest.approx(0.1 * expected)
    loss.backward()
    assert float(tokens.current.grad) == pytest.approx(0.1 * gradient)


def test_what_a_token_weighs() -> None:
    lengths = [1, 3]
    assert grpo.token_weights(lengths, "tokens", 8) == [1 / 4, 1 / 4]
    assert grpo.token_weights(lengths, "sequences", 8) == [1 / 2, 1 / 6]
    assert grpo.token_weights(lengths, "constant", 8) == [1 / 16, 1 / 16]


def test_minibatches_hold_every_trajectory_once() -> None:
    made = [trajectory([1], [n]) for n in range(7)]
    for count in (1, 2, 3, 7):
        parts = learner.minibatches(made, count)
        assert [t for part in parts for t in part] == made and len(parts) <= count


def trajectory(prompt: list[int], completion: list[int]) -> Trajectory:
    return Trajectory(prompt, completion, [-1.0] * len(completion), 0.5)


def test_trajectories_pack_into_rows_in_the_order_of_their_logprobs(model: torch.nn.Module) -> None:
    made = [
        trajectory([1, 2, 3], [4, 5]),
        trajectory([6], [7, 8, 9, 10]),
        trajectory([11, 12], [13]),
    ]
    rows = learner.pack(made, 10)
    assert [t for row in rows for t in row] == made and len(rows) == 2
    batch = learner.as_micro_batch(rows, 10)
    packed, _ = token_logprobs(model, batch)
    parts = [learner.as_micro_batch([[t]], 10) for row in rows for t in row]
    alone = [token_logprobs(model, part)[0] for part in parts]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "has_it", "told"),
    [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)],
)
def test_bfloat16_that_a_cpu_lacks_is_told(
    dtype: str, has_it: bool, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    worker = object.__new__(lm.Worker)
    worker.rank, worker.step, worker.stage = 0, None, Stage(dtype=dtype)
    worker.engine = SimpleNamespace(device=torch.device("cpu"))
    worker.run = SimpleNamespace(say=lambda step, line: lines.append(line))
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda: has_it)
    worker._warn()
    assert len(lines) == told and all("dtype: float32" in line for line in lines)


def test_whether_a_cpu_has_bfloat16_is_known() -> None:
    assert device.multiplies_bfloat16() in (True, False)
