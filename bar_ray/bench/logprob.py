"""Log-probabilities over a vocabulary of 100,352: time, and memory beyond inputs and weights.

Peers: all logits at once, Liger's rule for the rows of a chunk (next power of two above
N / ceil(V / D)) in the same code, and TRL's chunked function.
"""

from collections.abc import Callable

import torch
from trl.kernels import ChunkedLogProbFunction

from bar_ray.bench import rounds, training
from kernels import token_logprob

TOKENS, WIDTH, VOCAB = 1024, 512, 100_352
TRL_CHUNK = 4096  # columns, the default of its trainers


def naive(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -torch.nn.functional.cross_entropy((x @ w.T).float(), targets, reduction="none")


def ours(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_logprob.token_logprob(x, w, targets)[0]


def liger_chunks(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    rows = -(-len(x) // -(-len(w) // x.shape[1]))
    return token_logprob.token_logprob(x, w, targets, chunk=1 << (rows - 1).bit_length())[0]


def trl(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return ChunkedLogProbFunction.apply(x, w, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())[0]


SIDES = {"ours": ours, "naive": naive, "Liger's chunks": liger_chunks, "TRL": trl}


def prepared(name: str, head_learns: bool, threads: int) -> Callable[[], None]:
    torch.set_num_threads(threads)
    generator, dtype = torch.Generator().manual_seed(0), training.dtype_here()
    x = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    w = (torch.randn(VOCAB, WIDTH, generator=generator) / WIDTH**0.5).to(dtype)
    w.requires_grad_(head_learns)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    form = SIDES[name]

    def act() -> None:
        form(x, w, targets).mean().backward()
        x.grad = w.grad = None

    form(x[:2], w[:100], targets[:2] % 100).sum().backward()  # libraries start up
    x.grad = w.grad = None
    return act


def run(num_rounds: int = 3) -> list[rounds.Row]:
    found = []
    for head_learns in (False, True):
        threads = torch.get_num_threads()
        memory = {n: rounds.peak_mib(prepared, n, head_learns, threads)[1] for n in SIDES}
        sides = {name: prepared(name, head_learns, threads) for name in SIDES}
        dtype = str(training.dtype_here()).removeprefix("torch.")
        what = f"log-probabilities, head {'learns' if head_learns else 'frozen'}, {dtype}"
        shown = {f"{name}, MiB": f"{each:.0f}" for name, each in memory.items()}
        found.append(rounds.measure(what, sides, num_rounds, **shown))
    return found
