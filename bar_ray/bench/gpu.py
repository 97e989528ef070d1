"""What only a GPU can show, in one call: `python -m bar_ray.bench.gpu OUTPUT`.

Checks every kernel on the device against its formula in fp64, then times it at 7B dimensions
against what else is there, then whole training steps of as many 2x7B layers as fit. Writes
results.json and results.md to the folder OUTPUT. Needs torch, Triton and transformers alone; on CPU
(`--small`, with TRITON_INTERPRET=1) it shows that the script itself works, and `--predict H100`
says without a GPU what is expected of one: products at the speed that large ones reach, plus the
fewest bytes that element-wise work and the optimizer must move.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

from bar_ray.cost import Shape, peak_flops
from bar_ray.data.batches import MicroBatch
from bar_ray.model import experts, freeze, fused
from bar_ray.recipe import Learn
from bar_ray.train.loss import token_logprobs
from kernels import expert_ffn, rmsnorm, swiglu_gate, token_logprob

Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured: 7B dimensions, or small ones."""

    hidden: int = 4096
    ffn: int = 11008
    heads: int = 32
    vocab: int = 100_352
    tokens: tuple[int, ...] = (2048, 8192)
    seq_len: int = 4096
    layers: tuple[int, ...] = (16, 12, 8, 4)  # the most that fit
    repeats: int = 20


SMALL = Sizes(32, 48, 4, 64, (8,), 16, (2,), 2)


# FLOP/s of bf16 products of 8192 x 8192 and bytes/s of copies, as measured on cards of that name.
REACHED = {"H100": (798e12, 3.0e12), "H200": (780e12, 4.3e12)}
# Element-wise work of a layer of a 2x7B in training, bytes per hidden unit and token: forward by
# the kernels and eagerly, and as much again twice in the backward pass.
LAYER_BYTES = {True: 3 * 64, False: 3 * 288}


class Device:
    """Where things run, its clock and memory, and what is expected of it."""

    def __init__(self, predict: str = "") -> None:
        self.name = "meta" if predict else "cuda" if torch.cuda.is_available() else "cpu"
        self.is_gpu = self.name == "cuda"
        self.label = predict or (torch.cuda.get_device_name() if self.is_gpu else "CPU")
        self.reached = next((r for name, r in REACHED.items() if name in self.label), None)

    def timed(
        self, what: str, work: Callable[[], Any], repeats: int, flops: float, moved: float
    ) -> Result:
        """Expected and measured milliseconds; `moved` are bytes."""
        found: Result = {"what": what}
        if self.reached:
            found["expected ms"] = 1e3 * (flops / self.reached[0] + moved / self.reached[1])
        if self.name != "meta":
            found["ms"] = 1e3 * self.seconds(work, repeats)
        return found

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int) -> float:
        """The median of single runs after three that warm up."""
        taken = []
        for number in range(repeats + 3):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            if number >= 3:
                taken.append(time.perf_counter() - started)
        return median(taken)

    def peak_gib(self, work: Callable[[], Any]) -> float:
        """Memory of the work beyond what there was before."""
        if not self.is_gpu:
            return 0.0
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


def check(device: Device) -> list[Result]:
    """Largest error of each kernel in bf16 beside the largest value, forward and backward."""
    torch.manual_seed(0)
    rows, width, hidden, head = 77, 96, 160, 32
    found = []

    def compare(name: str, kernel: Callable, plain: Callable, *inputs: torch.Tensor) -> None:
        ours = [i.to(device.name).bfloat16().requires_grad_() for i in inputs]
        exact = [i.detach().double().requires_grad_() for i in ours]
        y, wanted = kernel(*ours), plain(*exact)
        dy = torch.randn(y.shape, device=device.name)
        given = torch.autograd.grad(y, ours, dy.to(y.dtype))
        right = torch.autograd.grad(wanted, exact, dy.to(y.dtype).double())
        pairs = zip((y, *given), (wanted, *right), strict=True)
        error = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
        found.append({"what": f"check {name}", "error": error})
        if error > 0.05:
            raise AssertionError(f"{name} is off by {error:.3f} of the largest value")

    x, residual = torch.randn(2, rows, width)
    w = torch.rand(width)
    cos, sin = torch.randn(2, rows, head).to(device.name)
    eps = 1e-6
    compare("rmsnorm", lambda x, w: rmsnorm.rmsnorm(x, w, eps), _norm(eps), x, w)
    compare(
        "rmsnorm + residual",
        lambda x, w, r: rmsnorm.rmsnorm(x, w, eps, r),
        lambda x, w, r: rmsnorm.reference(x, w, eps, r),
        *(x, w, residual),
    )
    compare(
        "rmsnorm + rotation",
        lambda x, w: rmsnorm.rmsnorm(x, w, eps, rotary=(cos, sin)),
        lambda x, w: rmsnorm.reference(x, w, eps, rotary=(cos.double(), sin.double())),
        *(x, w),
    )
    weights = [torch.randn(s) / s[1] ** 0.5 for s in _weight_shapes(width, hidden, 3)]
    gates = torch.rand(rows, 3)
    left_out = torch.arange(rows, device=device.name) % 3
    compare(
        "expert_ffn", _ffn(expert_ffn.expert_ffn), _ffn(expert_ffn.reference), x, gates, *weights
    )

    def complement(x: torch.Tensor, p: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        return expert_ffn.complement_ffn(x, p, _by_three(w), left_out)

    def masked(x: torch.Tensor, p: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        kept = torch.ones_like(p).scatter(1, left_out[:, None], 0.0)
        return expert_ffn.reference(x, p * kept, _by_three(w))

    compare("complement_ffn", complement, masked, x, gates, *weights)
    head_weight = torch.randn(200, width) / width**0.5
    targets = torch.randint(0, 200, (rows,), device=device.name)
    compare(
        "token_logprob",
        lambda x, w: token_logprob.token_logprob(x, w, targets, 0.7, chunk=32)[0],
        lambda x, w: token_logprob.reference(x, w, targets, 0.7)[0],
        *(x, head_weight),
    )
    return found


def _norm(eps: float) -> Callable:
    return lambda x, w: rmsnorm.reference(x, w, eps)


def _weight_shapes(width: int, hidden: int, experts: int) -> list[tuple[int, int]]:
    return [(hidden, width), (hidden, width), (width, hidden)] * experts


def _by_three(weights: Sequence[torch.Tensor]) -> list[expert_ffn.Expert]:
    return list(zip(weights[::3], weights[1::3], weights[2::3], strict=True))


def _ffn(form: Callable) -> Callable:
    return lambda x, p, *w: form(x, p, _by_three(w))


def ffn(device: Device, sizes: Sizes) -> list[Result]:
    """Two experts, the first frozen, forward and backward, against the bare products."""
    found = []
    for tokens in sizes.tokens:
        x = _randn(device, tokens, sizes.hidden).requires_grad_()
        gates = torch.rand(tokens, 2, device=device.name).requires_grad_()
        shapes = _weight_shapes(sizes.hidden, sizes.ffn, 2)
        weights = [_randn(device, *shape) / shape[1] ** 0.5 for shape in shapes]
        for weight in weights[3:]:
            weight.requires_grad_()
        pair = _by_three(weights)
        dy = _randn(device, tokens, sizes.hidden)
        learning = [x, gates, *weights[3:]]

        def ours(x=x, gates=gates, pair=pair, dy=dy, learning=learning) -> None:
            torch.autograd.grad(expert_ffn.expert_ffn(x, gates, pair), learning, dy)

        def plain(x=x, gates=gates, pair=pair, dy=dy, learning=learning) -> None:
            torch.autograd.grad(expert_ffn.reference(x, gates, pair), learning, dy)

        sides = {
            "ours": ours,
            "plain torch, same freezing": plain,
            "the bare cuBLAS products": _products(pair, x.detach(), dy),
            "bmm, both experts learn": _stacked(pair, x.detach(), dy, torch.bmm),
        }
        if hasattr(F, "grouped_mm") and device.is_gpu:
            sides["F.grouped_mm, both experts learn"] = _grouped(pair, x.detach(), dy)
        one, wide = 2 * 3 * sizes.hidden * sizes.ffn * tokens, 2 * sizes.ffn * tokens
        for name, work in sides.items():
            # 2 forward, 2 for input gradients, 1 or 2 for weight gradients; reads and writes of
            # g, u, h and their gradients by one kernel each, or by one operation after the other.
            flops = one * (6 if "both" in name else 5)
            moved = wide * {"ours": 17, "the bare cuBLAS products": 0}.get(name, 38)
            what = f"expert FFN, {tokens} tokens: {name}"
            timed = device.timed(what, work, sizes.repeats, flops, moved)
            if "ms" in timed:
                timed["needed TFLOP/s"] = 5 * one / timed["ms"] / 1e9
                timed["GiB beyond inputs"] = device.peak_gib(work)
            found.append(timed)
    return found


def _products(pair: Sequence[expert_ffn.Expert], x: torch.Tensor, dy: torch.Tensor) -> Callable:
    """Every matrix product of the layer and nothing else: the bound."""

    def work() -> None:
        for number, (gate, up, down) in enumerate(pair):
            g, u = x @ gate.T, x @ up.T
            g @ down.T
            dh = dy @ down
            dh @ gate
            dh @ up
            if number:
                dh.T @ x
                dh.T @ x
                dy.T @ u

    return torch.no_grad()(work)


def _stack(pair: Sequence[expert_ffn.Expert]) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, D, 2I] and [E, I, D], as leaves."""
    up = torch.stack([torch.cat((g, u)).T for g, u, _ in pair]).detach().contiguous()
    down = torch.stack([d.T for *_, d in pair]).detach().contiguous()
    return up.requires_grad_(), down.requires_grad_()


def _stacked(
    pair: Sequence[expert_ffn.Expert], x: torch.Tensor, dy: torch.Tensor, product: Callable
) -> Callable:
    up, down = _stack(pair)
    xs = x.expand(len(pair), *x.shape).contiguous().requires_grad_()
    dys = dy.expand(len(pair), *dy.shape).contiguous()

    def work() -> None:
        g, u = product(xs, up).chunk(2, dim=-1)
        torch.autograd.grad(product(F.silu(g) * u, down), (xs, up, down), dys)

    return work


def _grouped(pair: Sequence[expert_ffn.Expert], x: torch.Tensor, dy: torch.Tensor) -> Callable:
    up, down = _stack(pair)
    xs = x.repeat(len(pair), 1).requires_grad_()
    dys = dy.repeat(len(pair), 1)
    ends = torch.arange(1, len(pair) + 1, device=x.device, dtype=torch.int32) * len(x)

    def work() -> None:
        g, u = F.grouped_mm(xs, up, offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm((F.silu(g) * u).contiguous(), down, offs=ends)
        torch.autograd.grad(y, (xs, up, down), dys)

    return work


def elementwise(device: Device, sizes: Sizes) -> list[Result]:
    """Fused kernels against eager torch and torch.compile; bytes are the fewest that must move."""
    tokens = sizes.tokens[-1]
    x, residual, dy = (_randn(device, tokens, sizes.hidden) for _ in range(3))
    x.requires_grad_()
    w = torch.ones(sizes.hidden, device=device.name, dtype=torch.bfloat16)
    head = sizes.hidden // sizes.heads
    rotary = tuple(torch.randn(2, tokens, head, device=device.name))
    g, u, dh = (_randn(device, tokens, sizes.ffn) for _ in range(3))
    g.requires_grad_()
    u.requires_grad_()
    p = torch.rand(tokens, device=device.name)

    def trained(form: Callable, inputs: Sequence[torch.Tensor], gradient: torch.Tensor) -> Callable:
        return lambda: torch.autograd.grad(form(), inputs, gradient)

    def swiglu() -> None:
        swiglu_gate.forward(g, u, p)
        swiglu_gate.backward(dh, g, u, p, with_h=True)

    one = 2 * tokens * sizes.hidden
    wide = 2 * tokens * sizes.ffn
    cases: dict[str, tuple[int, dict[str, Callable]]] = {}
    for name, beside, moved in (
        ("rmsnorm + residual", {"residual": residual}, 3 + 3),
        ("rmsnorm + rotation", {"rotary": rotary}, 2 + 3),
    ):
        eager = lambda beside=beside: rmsnorm.reference(x, w, 1e-6, **beside)  # noqa: E731
        kernel = lambda beside=beside: rmsnorm.rmsnorm(x, w, 1e-6, **beside)  # noqa: E731
        sides = {"ours": trained(kernel, [x], dy), "eager": trained(eager, [x], dy)}
        if device.is_gpu:
            sides["compiled"] = trained(torch.compile(eager), [x], dy)
        cases[name] = (moved * one, sides)
    eager_gate = lambda: swiglu_gate.reference(g, u, p.bfloat16())  # noqa: E731
    sides = {"ours": swiglu, "eager": trained(eager_gate, [g, u], dh)}
    if device.is_gpu:
        sides["compiled"] = trained(torch.compile(eager_gate), [g, u], dh)
    cases["SwiGLU with gate"] = (9 * wide, sides)
    found = []
    for name, (moved, sides) in cases.items():
        for side, work in sides.items():
            what = f"{name}, {tokens} tokens: {side}"
            found.append(device.timed(what, work, sizes.repeats, 0, moved))
            if "ms" in found[-1]:
                found[-1]["TB/s"] = moved / found[-1]["ms"] / 1e9
    return found


def logprob(device: Device, sizes: Sizes) -> list[Result]:
    """Log-probabilities over the whole vocabulary, frozen and learning head."""
    found = []
    tokens = sizes.tokens[-1] // 2 or 1
    x = _randn(device, tokens, sizes.hidden).requires_grad_()
    targets = torch.randint(0, sizes.vocab, (tokens,), device=device.name)
    for learns in (False, True):
        w = (_randn(device, sizes.vocab, sizes.hidden) / sizes.hidden**0.5).requires_grad_(learns)
        inputs = [x, w] if learns else [x]
        product, logits = 2 * sizes.hidden * sizes.vocab * tokens, sizes.vocab * tokens
        for name, form, products, moved in (
            ("ours", token_logprob.token_logprob, 4 if learns else 2, 14 if learns else 10),
            ("all logits", token_logprob.reference, 3 if learns else 2, 26),
        ):
            work = lambda form=form, w=w, inputs=inputs: torch.autograd.grad(  # noqa: E731
                form(x, w, targets)[0].sum(), inputs
            )
            what = f"log-probabilities, {tokens} tokens, head "
            what += f"{'learns' if learns else 'frozen'}: {name}"
            repeats = max(2, sizes.repeats // 4)
            found.append(device.timed(what, work, repeats, products * product, moved * logits))
            if "ms" in found[-1]:
                found[-1]["GiB beyond inputs"] = device.peak_gib(work)
    return found


STAGES = {
    "midtrain": Learn(expert=1, router=1),
    "rlvr": Learn(expert=1, router=1, embedding=1, lm_head=1, attention=1, norm=1),
}


def training(device: Device, sizes: Sizes) -> list[Result]:
    """Steps of 2x7B layers without head and tail of depth: tokens/s and MFU by counted FLOPs."""
    found = []
    for stage, learn in STAGES.items():
        for layers in sizes.layers:
            try:
                found += [
                    _steps(device, sizes, stage, learn, layers, side) for side in (True, False)
                ]
                break
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
    return found


def _steps(
    device: Device, sizes: Sizes, stage: str, learn: Learn, layers: int, kernels: bool
) -> Result:
    config = FlexOlmoConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        vocab_size=sizes.vocab,
        num_experts=2,
        num_experts_per_tok=2,
        max_position_embeddings=sizes.seq_len,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = FlexOlmoForCausalLM(config).bfloat16()
        for layer in model.model.layers:
            layer.mlp = experts.SplitMoe(config).bfloat16()
    rotary = type(model.model.rotary_emb)(config)
    model.to_empty(device=device.name)
    model.model.rotary_emb = rotary.to(device.name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else parameter.data.fill_(
            1
        )
    fused.swap(model, kernels)
    freeze.apply(model, learn)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, weight_decay=0.0, fused=True)
    tokens = torch.randint(1, sizes.vocab, (1, sizes.seq_len), device=device.name)
    positions = torch.arange(sizes.seq_len, device=device.name).expand(1, -1)
    batch = MicroBatch(tokens, (positions > 0).long(), positions)

    def step() -> None:
        (-token_logprobs(model, batch)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    flops = Shape.of(config.to_dict()).flops(learn, sizes.seq_len).total * sizes.seq_len
    # AdamW reads weights, gradients and two moments and writes all but the gradients, in bf16.
    moved = 14 * sum(p.numel() for p in learning)
    moved += LAYER_BYTES[kernels] * layers * sizes.hidden * sizes.seq_len
    what = f"{stage} step, {layers} layers of 2x7B, {sizes.seq_len} tokens: "
    what += "kernels" if kernels else "plain torch"
    found = device.timed(what, step, max(2, sizes.repeats // 4), flops, moved)
    peak = peak_flops(device.label)
    for name in {"ms", "expected ms"} & found.keys():
        kind = "expected " if name == "expected ms" else ""
        found[f"{kind}tokens/s"] = 1e3 * sizes.seq_len / found[name]
        if peak:
            found[f"{kind}MFU, percent"] = 1e5 * flops / found[name] / peak
    return found


def _randn(device: Device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device.name, dtype=torch.bfloat16)


def table(results: list[Result]) -> str:
    """Markdown: a line per result, its figures by name."""
    lines = ["| what | figures |", "|---|---|"]
    for each in results:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in each.items() if name != "what")
        lines.append(f"| {each['what']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--small", action="store_true", help="sizes for a try on CPU")
    parser.add_argument("--predict", choices=list(REACHED), default="", help="measure nothing")
    arguments = parser.parse_args()
    device, sizes = Device(arguments.predict), SMALL if arguments.small else Sizes()
    if device.name == "cpu" and not arguments.small:
        parser.error("there is no CUDA device; --small tries the script on CPU")
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    if device.name != "meta":
        results += check(device)
    for part in (ffn, elementwise, logprob, training):
        results += part(device, sizes)
        about = {"device": device.label, "torch": torch.__version__, "results": results}
        (arguments.output / "results.json").write_text(json.dumps(about, indent=1))
    (arguments.output / "results.md").write_text(f"{device.label}\n\n{table(results)}\n")
    print(table(results))


if __name__ == "__main__":
    main()
