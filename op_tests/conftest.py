"""Options and parameters shared by all op tests: ``--device``, ``--wave`` and ``target``."""

from __future__ import annotations

import os

import _checkout  # noqa: F401
import hypothesis
import pytest
from targets import CPU_WAVES, select_targets

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("fixed")

# NOTE: which path is the fastest here, a file of `python -m aiter tune` may know; tests ask for the
# path that fits.
os.environ.setdefault("AITER_DISPATCH", "capacity")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that choose the targets."""
    group = parser.getgroup("op_tests")
    group.addoption("--device", help="cpu or cuda; default: cuda where there is a GPU, else cpu")
    group.addoption("--wave", type=int, choices=CPU_WAVES, help="one wave width of the CPU target")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes a `target` once per chosen target."""
    if "target" in metafunc.fixturenames:
        options = metafunc.config.option
        targets = select_targets(options.device, options.wave)
        metafunc.parametrize("target", targets, ids=str)
