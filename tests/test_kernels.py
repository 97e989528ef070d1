"""Kernels against their formulas in fp64: outputs, gradients, what is kept; Triton interpreted."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import average, expert_ffn, swiglu_gate, token_logprob

SHAPES = [(1, 4, 6, 2), (7, 5, 9, 3), (0, 4, 8, 2), (33, 16, 40, 5)]  # N, D, I, E
ROOM = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of the type, beside the largest value there is."""
    assert found.shape == expected.shape
    if expected.numel():
        scale = max(1.0, float(expected.detach().abs().max()))
        assert float((found.double() - expected).detach().abs().max()) < ROOM[dtype] * scale


def ffn(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, list[expert_ffn.Expert]]:
    torch.manual_seed(0)
    tokens, width, hidden, count = shape
    sizes = ((hidden, width), (hidden, width), (width, hidden))
    experts = [
        tuple((torch.randn(size) / size[1] ** 0.5).to(dtype) for size in sizes)
        for _ in range(count)
    ]
    return torch.randn(tokens, width).to(dtype), torch.rand(tokens, count), experts


def as_double(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("dtype", ROOM)
@pytest.mark.parametrize("shape", SHAPES)
def test_expert_ffn(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, gates, experts = ffn(shape, dtype)
    flat = [x, gates, *(w for e in experts for w in e)]
    exact = as_double(flat)
    expected = expert_ffn.reference(exact[0], exact[1], by_three(exact[2:]))
    for tensor in flat:
        tensor.requires_grad_()
    found = expert_ffn.expert_ffn(x, gates, experts)
    near(found, expected, dtype)
    dy = torch.randn_like(x)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    for one, other in zip(torch.autograd.grad(found, flat, dy), wanted, strict=True):
        near(one, other, dtype)


def by_three(weights: Sequence[torch.Tensor]) -> list[expert_ffn.Expert]:
    return list(zip(weights[::3], weights[1::3], weights[2::3], strict=True))


def kept(function, *, less: Sequence[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, beside parameters."""
    known, found = {t.data_ptr() for t in less}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(found.values())


def test_what_is_frozen_gets_no_gradient_and_keeps_no_input() -> None:
    tokens, width, hidden, count = 16, 8, 24, 2
    x, gates, experts = ffn((tokens, width, hidden, count), torch.float32)
    x.requires_grad_()
    gates.requires_grad_()
    weights = [w for e in experts for w in e]
    activations = 4 * tokens * count * (1 + 2 * hidden)  # gates; g and u of each expert

    def run() -> None:
        y = expert_ffn.expert_ffn(x, gates, experts)
        y.sum().backward()

    assert kept(run, less=[*weights, x]) == activations
    assert all(w.grad is None for w in weights) and x.grad is not None
    assert kept(lambda: expert_ffn.expert_ffn(x, gates, experts), less=weights) == activations
    experts[1][0].requires_grad_()
    run()
    assert kept(run, less=weights) == activations + 4 * tokens * width
    assert [w.grad is not None for w in weights] == [False] * 3 + [True, False, False]


def test_nothing_is_formed_below_the_experts_when_nothing_learns_there() -> None:
    x, gates, experts = ffn(SHAPES[3], torch.float32)
    experts[1][2].requires_grad_()
    expert_ffn.expert_ffn(x, gates, experts).sum().backward()
    assert x.grad is None and gates.grad is None and experts[1][2].grad is not None


# --- log-probabilities ----------------------------------------------------------------------------


def head(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x, w = torch.randn(tokens, 12).to(dtype), (torch.randn(31, 12) / 3).to(dtype)
    return x, w, torch.randint(0, 31, (tokens,))


def exact_logprob(
    x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logs = torch.log_softmax(x @ w.T / temperature, dim=-1)
    return logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("dtype", ROOM)
@pytest.mark.parametrize(("tokens", "chunk"), [(0, 4), (1, 4), (13, 4), (13, 0), (8, 8)])
def test_token_logprob_under_a_frozen_head(tokens: int, chunk: int, dtype: torch.dtype) -> None:
    x, w, targets = head(tokens, dtype)
    x.requires_grad_()
    exact, fixed = x.detach().double().requires_grad_(), w.double()
    expected, its_entropy = exact_logprob(exact, fixed, targets, 0.7)
    found, entropy = token_logprob.token_logprob(x, w, targets, 0.7, chunk)
    assert found.dtype == torch.float32 and not entropy.requires_grad
    near(found, expected, dtype)
    near(entropy, its_entropy, dtype)
    slope = torch.randn(tokens)
    found.backward(slope)
    expected.backward(slope.double())
    near(x.grad, exact.grad, dtype)


@pytest.mark.parametrize("dtype", ROOM)
@pytest.mark.parametrize("frozen", [False, True])
def test_logprob_loss_forms_both_gradients(frozen: bool, dtype: torch.dtype) -> None:
    """Of a loss that is no straight line, as clipped policy losses are."""
    x, w, targets = head(13, dtype)
    x.requires_grad_()
    w.requires_grad_(not frozen)
    exact, its_head = as_double([x, w])
    weight, old = torch.rand(13), torch.randn(13)

    def loss_of(logp: torch.Tensor, rows: slice) -> torch.Tensor:
        ratio = (logp - old.to(logp)[rows]).exp()
        return -weight.to(logp)[rows] * torch.minimum(ratio, ratio.clamp(0.8, 1.2))

    total, logp, entropy = token_logprob.logprob_loss(x, w, targets, loss_of, 0.7, chunk=4)
    expected, its_entropy = exact_logprob(exact, its_head, targets, 0.7)
    loss = loss_of(expected, slice(None)).sum()
    near(total, loss, dtype)
    near(logp, expected, dtype)
    near(entropy, its_entropy, dtype)
    (3 * total).backward()
    (3 * loss).backward()
    near(x.grad, exact.grad, dtype)
    assert w.grad is None if frozen else near(w.grad, its_head.grad, dtype) is None


def test_losses_are_summed_in_fp32() -> None:
    """In bfloat16 a sum of equal small losses stops growing."""
    x, w = torch.zeros(4096, 8, dtype=torch.bfloat16), torch.zeros(16, 8, dtype=torch.bfloat16)
    targets = torch.zeros(4096, dtype=torch.long)
    total, *_ = token_logprob.logprob_loss(x, w, targets, lambda logp, _: -logp, chunk=16)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(4096 * torch.tensor(16.0).log().item(), rel=1e-5)


def test_a_head_that_learns_is_not_passed_over_in_silence() -> None:
    x, w, targets = head(3, torch.float32)
    with pytest.raises(ValueError, match="logprob_loss"):
        token_logprob.token_logprob(x, w.requires_grad_(), targets)


# --- averages of files ----------------------------------------------------------------------------


def in_files(values: Sequence[torch.Tensor], folder: Path) -> list[average.Region]:
    """Each in a file of its own, behind three other bytes."""
    regions = []
    for number, value in enumerate(values):
        path = folder / str(number)
        path.write_bytes(b"...")
        with open(path, "ab", buffering=0) as file:
            average.write(file, average.as_bytes(value))
        size = value.numel() * value.element_size()
        regions.append(average.Region(os.open(path, os.O_RDONLY), 3, size))
    return regions


@pytest.mark.parametrize("dtype", ROOM)
@pytest.mark.parametrize("count", [0, 1, 999, average.BLOCK, 2 * average.BLOCK + 7])
def test_mean_of_files(count: int, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(count)
    values = [torch.randn(count).to(dtype) for _ in range(3)]
    with open(tmp_path / "out", "wb", buffering=0) as out:
        average.mean(in_files(values, tmp_path), dtype, out)
    found = torch.frombuffer(bytearray((tmp_path / "out").read_bytes() or b" " * 4), dtype=dtype)
    found = found[:count]
    assert torch.equal(found, average.reference(values))
    exact = torch.stack([value.double() for value in values]).mean(0)
    assert torch.allclose(found.double(), exact, rtol=ROOM[dtype], atol=ROOM[dtype])


def test_mean_of_bf16_is_rounded_once() -> None:
    values = [torch.tensor([1.0, 1.0 + 2**-7, 1.0], dtype=torch.bfloat16) for _ in range(2)]
    values.append(torch.tensor([2.0, 1.0, 1.0], dtype=torch.bfloat16))
    exact = torch.stack([value.double() for value in values]).mean(0).to(torch.bfloat16)
    assert torch.equal(average.reference(values), exact)


def test_mean_keeps_what_all_agree_on() -> None:
    value = torch.randn(1000)
    assert all(torch.equal(average.reference([value] * n), value) for n in range(1, 8))


@pytest.mark.parametrize("refusal", [None, OSError(18, "not across file systems")])
def test_bytes_are_copied(refusal: OSError | None, tmp_path: Path, monkeypatch: Any) -> None:
    content = torch.randn(3 * average.BLOCK + 5)
    (region,) = in_files([content], tmp_path)
    if refusal:
        monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(refusal))
    with open(tmp_path / "out", "wb", buffering=0) as out:
        average.write(out, memoryview(b"head"))
        average.copy(region, out)
        average.write(out, memoryview(b"tail"))
    assert (tmp_path / "out").read_bytes() == b"head" + bytes(average.as_bytes(content)) + b"tail"


def test_a_file_that_ends_early_is_told(tmp_path: Path) -> None:
    (region,) = in_files([torch.randn(10)], tmp_path)
    with open(tmp_path / "out", "wb", buffering=0) as out:
        for act in (average.copy, lambda *a: average.mean([a[0]], torch.float32, a[1])):
            with pytest.raises(EOFError):
                act(region._replace(num_bytes=80), out)


# --- Triton ---------------------------------------------------------------------------------------


@pytest.mark.skipif(swiglu_gate.triton is None, reason="Triton is not installed")
def test_triton_kernels_agree_with_torch_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["swiglu_gate"] * 6


def _interpreted() -> None:
    for dtype in ROOM:
        for rows, width in ((1, 5), (3, 1024), (2, 1500)):
            torch.manual_seed(rows)
            g, u, dh = torch.randn(3, rows, width).to(dtype)
            p = torch.rand(rows)
            exact = as_double([g, u, p])
            h = swiglu_gate.reference(*exact)
            wanted = torch.autograd.grad(h, exact, dh.double())
            assert swiglu_gate._on_triton(g)
            near(swiglu_gate.forward(g, u, p), h, dtype)
            *found, again = swiglu_gate.backward(dh, g, u, p, with_h=True)
            for one, other in zip((*found, again), (*wanted, h), strict=True):
                near(one, other, dtype)
            assert swiglu_gate.backward(dh, g, u, p, with_h=False)[3] is None
            print("swiglu_gate")


if __name__ == "__main__":
    _interpreted()
