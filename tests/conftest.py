"""What several test files share: a throwaway Ray token, an S3 server, a small random model."""

import atexit
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

status: list[int] = []
begun = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "begin no slow test after so many minutes; those left out are told as skipped"
    parser.addoption("--minutes", type=float, default=float("inf"), help=told)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs come last: what they go through was tested before, part by part."""
    items.sort(key=lambda item: item.get_closest_marker("late") is not None)


@pytest.hookimpl(tryfirst=True)  # before anything is set up for the test
def pytest_runtest_setup(item: pytest.Item) -> None:
    passed, most = (time.monotonic() - begun) / 60, item.config.getoption("minutes")
    if passed > most and item.get_closest_marker("slow"):
        pytest.skip(f"not begun: {passed:.0f} of --minutes {most:g} were over")


def pytest_sessionfinish(exitstatus: int) -> None:
    status.append(int(exitstatus))


@atexit.register  # before any library registers its own: the last to run
def _leave() -> None:
    """End with pytest's verdict, without the destructors of C++ libraries.

    Threads of Ray's and gRPC's, which outlive `ray.shutdown()`, sometimes call what those have
    destroyed: a run with every test passed once ended in a segmentation fault.
    """
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[-1])


# Ray reads its token when it is first imported.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = "throwaway-token-of-the-tests"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["BAR_RAY_CACHE"] = tempfile.mkdtemp(prefix="bar_ray-cache-")
atexit.register(shutil.rmtree, os.environ["BAR_RAY_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A port that nobody listens on."""

    def find() -> int:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return server.getsockname()[1]

    return find


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The query that leads to a real S3-protocol server with the bucket `bkt`."""
    from bar_ray.bench.outages import serving

    with serving() as (_, query):
        yield query


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage root: the same tests for a local disk and for S3."""
    if request.param == "local":
        return str(tmp_path / "store")
    return f"s3://bkt/{tmp_path.name}{request.getfixturevalue('s3')}"


def _write_moe(folder: Path, **sizes: int) -> Path:
    """Write a two-expert FlexOlmo of random weights as a Hugging Face folder."""
    import torch
    from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

    torch.manual_seed(0)
    fixed = {"num_hidden_layers": 2, "num_experts": 2, "num_experts_per_tok": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = FlexOlmoForCausalLM(FlexOlmoConfig(**fixed, **heads, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def small_moe(tmp_path: Path) -> Path:
    """A two-expert FlexOlmo of random weights, as a Hugging Face folder."""
    return _write_moe(tmp_path / "model", vocab_size=40, hidden_size=16, intermediate_size=24)


@pytest.fixture(scope="module")
def larger_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, wide enough for vLLM."""
    folder = tmp_path_factory.mktemp("flex")
    return _write_moe(folder, vocab_size=64, hidden_size=64, intermediate_size=96)
