"""Kernels against their formulas in fp64: outputs, gradients, what is kept; Triton interpreted."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import pytest
import torch

from kernels import (
    average,
    device,
    expert_ffn,
    fused_mean,
    rmsnorm,
    swiglu_gate,
    token_logprob,
)

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


@pytest.mark.parametrize("dtype", ROOM)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 8, 24, 4)])
def test_complement_ffn(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each token leaves an expert out; some experts are left out by none, or by all."""
    x, gates, experts = ffn(shape, dtype)
    left_out = torch.randint(0, max(1, shape[3] - 1), (shape[0],))
    gates.scatter_(1, left_out[:, None], 0.0)
    flat = [x, gates, *(w for e in experts for w in e)]
    exact = as_double(flat)
    expected = expert_ffn.reference(exact[0], exact[1], by_three(exact[2:]))
    for tensor in flat:
        tensor.requires_grad_()
    found = expert_ffn.complement_ffn(x, gates, experts, left_out)
    near(found, expected, dtype)
    dy = torch.randn_like(x)
    wanted = list(torch.autograd.grad(expected, exact, dy.double()))
    wanted[1].scatter_(1, left_out[:, None], 0.0)  # a gate that is left out is not looked at
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


# --- RMSNorm --------------------------------------------------------------------------------------


def rmsnorm_agrees(rows: int, width: int, dtype: torch.dtype, beside: str, learns: bool) -> None:
    torch.manual_seed(rows)
    x, residual, dy = torch.randn(3, rows, width).to(dtype)
    w = torch.rand(width).to(dtype)
    cos, sin = torch.randn(2, rows, 6)
    inputs = [x, w, residual] if beside == "residual" else [x, w]
    exact = as_double(inputs)
    rotary = (cos, sin) if beside == "rotary" else None
    for tensor in inputs:
        tensor.requires_grad_(learns or tensor is not w)
    y = rmsnorm.rmsnorm(x, w, 1e-6, residual if beside == "residual" else None, rotary)
    wanted_y = rmsnorm.reference(
        exact[0],
        exact[1],
        1e-6,
        exact[2] if beside == "residual" else None,
        None if rotary is None else (cos.double(), sin.double()),
    )
    near(y, wanted_y, dtype)
    y.backward(dy)
    wanted = torch.autograd.grad(wanted_y, exact, dy.double())
    for tensor, gradient in zip(inputs, wanted, strict=True):
        if tensor.requires_grad:
            near(tensor.grad, gradient, dtype)
    assert learns == (w.grad is not None)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("beside", ["", "residual", "rotary"])
@pytest.mark.parametrize("dtype", ROOM)
@pytest.mark.parametrize(("rows", "width"), [(0, 12), (1, 6), (5, 48), (600, 18)])
def test_rmsnorm(
    rows: int,
    width: int,
    dtype: torch.dtype,
    beside: str,
    learns: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "CACHED_BYTES", 4 * 18 * 250)  # 600 rows are three blocks
    rmsnorm_agrees(rows, width, dtype, beside, learns)


@pytest.mark.parametrize("dtype", ROOM)
def test_rmsnorm_keeps_its_input_and_a_number_per_row(dtype: torch.dtype) -> None:
    x = torch.randn(64, 12, dtype=dtype, requires_grad=True)
    w, rotary = torch.ones(12, dtype=dtype, requires_grad=True), (torch.randn(64, 6),) * 2
    run = lambda **beside: rmsnorm.rmsnorm(x, w, 1e-6, **beside)  # noqa: E731
    for beside in ({}, {"residual": torch.randn(64, 12, dtype=dtype)}, {"rotary": rotary}):
        assert kept(lambda: run(**beside), less=[x, w, *rotary]) == 4 * 64  # noqa: B023


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
@pytest.mark.parametrize("learns", ["head", "below", "both", "none"])
@pytest.mark.parametrize(("tokens", "chunk"), [(0, 4), (1, 4), (13, 4), (13, 0), (8, 8)])
def test_token_logprob(tokens: int, chunk: int, learns: str, dtype: torch.dtype) -> None:
    x, w, targets = head(tokens, dtype)
    x.requires_grad_(learns in ("below", "both"))
    w.requires_grad_(learns in ("head", "both"))
    exact_x, exact_w = as_double([x, w])
    expected, its_entropy = exact_logprob(exact_x, exact_w, targets, 0.7)
    found, entropy = token_logprob.token_logprob(x, w, targets, 0.7, chunk)
    assert found.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    near(found, expected, dtype)
    near(entropy, its_entropy, dtype)
    if learns == "none":
        return
    slope = torch.randn(tokens)
    found.backward(slope)
    expected.backward(slope.double())
    for tensor, exact in ((x, exact_x), (w, exact_w)):
        if tensor.requires_grad:
            near(tensor.grad, exact.grad, dtype)
        else:
            assert tensor.grad is None


def test_log_probabilities_and_the_gradient_of_the_head_are_summed_in_fp32() -> None:
    """In bfloat16 a sum of equal small parts stops growing."""
    x = torch.ones(4096, 8, dtype=torch.bfloat16)
    w = torch.zeros(16, 8, dtype=torch.bfloat16, requires_grad=True)
    found, _ = token_logprob.token_logprob(x, w, torch.zeros(4096, dtype=torch.long), chunk=16)
    assert float(found.sum().detach()) == pytest.approx(-4096 * math.log(16), rel=1e-5)
    found.sum().backward()
    assert w.grad[0].float().tolist() == pytest.approx([4096 * 15 / 16] * 8, rel=5e-3)


def test_a_frozen_head_keeps_no_logits() -> None:
    x, w, targets = head(40, torch.float32)
    x.requires_grad_()
    dx = 4 * x.numel()
    assert kept(lambda: token_logprob.token_logprob(x, w, targets, chunk=8), less=[]) == dx


# --- averages of files ----------------------------------------------------------------------------


def in_files(values: Sequence[torch.Tensor], folder: Path) -> list[average.Region]:
    """Each in a file of its own, behind three other bytes."""
    regions = []
    for number, value in enumerate(values):
        path = folder / str(number)
        path.write_bytes(b"...")
        with open(path, "ab", buffering=0) as file:
            file.write(average.as_bytes(value))
        size = value.numel() * value.element_size()
        regions.append(average.Region(os.open(path, os.O_RDONLY), 3, size))
    return regions


def parts(out: FileIO, offset: int, num_bytes: int, part_bytes: int) -> list[average.Part]:
    stops = [*range(part_bytes, num_bytes, part_bytes), num_bytes]
    bounds = itertools.pairwise((0, *stops))
    return [average.Part(out.fileno(), offset, start, stop) for start, stop in bounds]


@pytest.mark.parametrize("dtype", ROOM)
@pytest.mark.parametrize("count", [0, 1, 999, average.BLOCK, 2 * average.BLOCK + 7])
def test_mean_of_files(count: int, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(count)
    values = [torch.randn(count).to(dtype) for _ in range(3)]
    regions = in_files(values, tmp_path)
    with open(tmp_path / "out", "wb", buffering=0) as out:
        for part in reversed(parts(out, 0, regions[0].num_bytes, 3 * average.BLOCK)):
            average.mean(regions, dtype, part)
    found = torch.frombuffer(bytearray((tmp_path / "out").read_bytes() or b" " * 4), dtype=dtype)
    found = found[:count]
    assert torch.equal(found, average.reference(values))
    exact = torch.stack([value.double() for value in values]).mean(0)
    assert torch.allclose(found.double(), exact, rtol=ROOM[dtype], atol=ROOM[dtype])


def test_fused_mean_is_the_reference_bit_for_bit() -> None:
    """Of every bfloat16 there is: signed zeros, subnormals, infinities, what is no number."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    for rows in (1, 2, 3, 8):
        torch.manual_seed(rows)
        values = torch.stack([every, *(every[torch.randperm(2**16)] for _ in range(rows - 1))])
        found = torch.empty_like(every)
        bits = values.view(torch.uint16).numpy(), found.view(torch.uint16).numpy()
        fused_mean.mean(*bits, 2**16 - 3)
        expected = average.reference([*values])
        is_number = ~expected[:-3].isnan()
        assert torch.equal(found[:-3].isnan(), ~is_number)
        same = found[:-3].view(torch.int16) == expected[:-3].view(torch.int16)
        assert same[is_number].all() and is_number.sum() > 2**15


def test_without_numba_means_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.randn(5).bfloat16() for _ in range(3)]
    regions, found = in_files(values, tmp_path), []
    for missing in (False, True):
        if missing:
            monkeypatch.setitem(sys.modules, "kernels.fused_mean", None)
            monkeypatch.delattr("kernels.fused_mean")
        average._fused.cache_clear()
        assert (average._fused() is None) is missing
        with open(tmp_path / "out", "wb", buffering=0) as out:
            average.mean(regions, torch.bfloat16, average.Part(out.fileno(), 0, 0, 10))
        found.append((tmp_path / "out").read_bytes())
    average._fused.cache_clear()
    assert found[0] == found[1]


def test_mean_of_bf16_is_rounded_once() -> None:
    values = [torch.tensor([1.0, 1.0 + 2**-7, 1.0], dtype=torch.bfloat16) for _ in range(2)]
    values.append(torch.tensor([2.0, 1.0, 1.0], dtype=torch.bfloat16))
    exact = torch.stack([value.double() for value in values]).mean(0).to(torch.bfloat16)
    assert torch.equal(average.reference(values), exact)


@pytest.mark.parametrize("dtype", ROOM)
def test_mean_keeps_what_all_agree_on(dtype: torch.dtype) -> None:
    value = torch.randn(1000).to(dtype)
    assert all(torch.equal(average.reference([value] * n), value) for n in range(1, 8))


@pytest.mark.parametrize("count", [0, 5, average.COPY_BYTES // 4, average.COPY_BYTES + 5])
def test_bytes_are_copied(count: int, tmp_path: Path) -> None:
    content = torch.randn(count)
    (region,) = in_files([content], tmp_path)
    with open(tmp_path / "out", "wb", buffering=0) as out:
        average.write(out.fileno(), memoryview(b"head"), 0)
        average.write(out.fileno(), memoryview(b"tail"), 4 + region.num_bytes)
        for part in reversed(parts(out, 4, region.num_bytes, average.COPY_BYTES + 4)):
            average.copy(region, part)
    assert (tmp_path / "out").read_bytes() == b"head" + bytes(average.as_bytes(content)) + b"tail"


def test_a_file_that_ends_early_is_told(tmp_path: Path) -> None:
    (region,) = in_files([torch.randn(10)], tmp_path)
    with open(tmp_path / "out", "wb", buffering=0) as out:
        for act in (average.copy, lambda *a: average.mean([a[0]], torch.float32, a[1])):
            with pytest.raises(EOFError):
                act(region, average.Part(out.fileno(), 0, 0, 80))


# --- Triton ---------------------------------------------------------------------------------------


@pytest.mark.skipif(device.triton is None, reason="Triton is not installed")
def test_triton_kernels_agree_with_torch_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["swiglu_gate"] * 6 + ["rmsnorm"] * 24


def _swiglu_gate_interpreted(rows: int, width: int, dtype: torch.dtype) -> None:
    g, u, dh = torch.randn(3, rows, width).to(dtype)
    p = torch.rand(rows)
    exact = as_double([g, u, p])
    h = swiglu_gate.reference(*exact)
    wanted = torch.autograd.grad(h, exact, dh.double())
    near(swiglu_gate.forward(g, u, p), h, dtype)
    *found, again = swiglu_gate.backward(dh, g, u, p, with_h=True)
    for one, other in zip((*found, again), (*wanted, h), strict=True):
        near(one, other, dtype)
    assert swiglu_gate.backward(dh, g, u, p, with_h=False)[3] is None
    print("swiglu_gate")


def _interpreted() -> None:
    rmsnorm.PROGRAMS = 8  # less than there are rows
    assert device.uses_triton(torch.zeros(1))
    for dtype in ROOM:
        for rows, width in ((1, 5), (3, 1024), (2, 1500)):
            torch.manual_seed(rows)
            _swiglu_gate_interpreted(rows, width, dtype)
    for dtype in ROOM:
        for rows, width in ((1, 6), (5, 48), (0, 12), (21, 18)):
            for beside in ("", "residual", "rotary"):
                rmsnorm_agrees(rows, width, dtype, beside, learns=rows != 5)
                print("rmsnorm")


if __name__ == "__main__":
    _interpreted()
