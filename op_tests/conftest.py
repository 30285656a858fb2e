"""Options and parameters shared by all op tests: ``--device``, ``--wave`` and ``target``.

Several processes (pytest-xdist) share the machine: each takes its part of the cores for PyTorch and
OpenMP, Triton's kernels are compiled where they are asked for, and whoever is done takes tests over from
others.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import _checkout  # noqa: F401
import hypothesis
import pytest
import torch
import without_clusters
from targets import CPU_WAVES, select_targets

from aiter.routing import known as remembered

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("fixed")

# NOTE: which path is the fastest here, a file of `python -m aiter tune` may know; tests ask for the
# path that fits.
os.environ.setdefault("AITER_DISPATCH", "capacity")

_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _PROCESSES > 1:
    _THREADS = max(1, (os.cpu_count() or 1) // _PROCESSES)
    torch.set_num_threads(_THREADS)
    os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))
    # NOTE: each process would else start as many compiling ones as there are cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the modules; lets processes of pytest-xdist take waiting tests from each other.

    Its default hands out runs of neighbours for good: all blocks of the documents to one process.
    """
    if config.getoption("--without-clusters"):
        without_clusters.request()
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "worksteal"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Makes what a test printed UTF-8, as which pytest-xdist sends it: a path may be anything."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that choose the targets."""
    group = parser.getgroup("op_tests")
    group.addoption("--device", help="cpu or cuda; default: cuda where there is a GPU, else cpu")
    group.addoption("--wave", type=int, choices=CPU_WAVES, help="one wave width of the CPU target")
    group.addoption(
        "--without-clusters", action="store_true",
        help="GPU modules as for GPUs without clusters, whose workgroups hand over through memory",
    )  # fmt: skip


# What `-m quick` leaves out: builds and processes of their own, GPU tools, whole models. The mark slow
# leaves out the CPU target's second wave width as well, whose builds would take a quarter of its time.
NOT_QUICK = (
    "fire",
    "integrations",
    "jit",
    "rocm",
    "test_bench.py",
    "test_docs.py",
    "test_exported_python.py",
    "test_second_name.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the first case of every test function as quick, where one case is no build of its own.

    What is marked thorough is left out, unless `-m` speaks of it. What is marked slow begins, so that no
    core waits for it at the end.
    """
    if "thorough" not in config.option.markexpr:
        left_out = [item for item in items if "thorough" in item.keywords]
        items[:] = [item for item in items if "thorough" not in item.keywords]
        config.hook.pytest_deselected(items=left_out)
    items.sort(key=lambda item: "slow" not in item.keywords)
    seen = set()
    for item in items:
        parts = item.path.relative_to(Path(__file__).parent).parts
        function = (item.path, getattr(item, "originalname", item.name))
        if parts[0] not in NOT_QUICK and function not in seen and "slow" not in item.keywords:
            item.add_marker("quick")
        seen.add(function)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes a `target` once per chosen target."""
    if "target" in metafunc.fixturenames:
        options = metafunc.config.option
        targets = select_targets(options.device, options.wave)
        metafunc.parametrize("target", targets, ids=str)


@pytest.fixture
def nothing_known() -> Iterator[None]:
    """Plans and known calls of earlier tests are forgotten, and those of this one afterwards."""
    remembered.forget()
    yield
    remembered.forget()
