"""Do the Python modules that are exported route right, and does fused_moe take their buffers?

They run in a process of their own, in a miniature tree that is `aiter` there; its compiled functions are
ours on the CPU, from the same package under another name.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import _checkout
import pytest
from trees import LAYOUTS, write_tree

from aiter.cli.main import main
from aiter.jit.envs import cache_dir

PROGRAM = Path(__file__).with_name("in_tree.py")
PACKAGE = Path(_checkout.__file__).parents[1] / "aiter"
HAS_TOOLS = all(importlib.util.find_spec(module) for module in ("black", "clang_format"))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TOOLS, reason="black or clang-format is missing")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_a_tree(tmp_path: Path, layout: str) -> None:
    root = write_tree(tmp_path / "tree", layout)
    assert main(["export", "--into", str(root)]) == 0
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "routing_of_ours").symlink_to(PACKAGE)
    builds = cache_dir()
    builds.mkdir(parents=True, exist_ok=True)
    (ours / "builds").mkdir()
    (ours / "builds" / "routing_of_ours").symlink_to(
        builds
    )  # the same sources make the same modules
    places = [str(root), str(ours), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(places),
        "AITER_AOT_IMPORT": "1",
        "AITER_JIT_DIR": str(ours / "builds"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], cwd=root, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all as expected"
