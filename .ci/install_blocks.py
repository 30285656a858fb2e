#!/usr/bin/env python3
"""Do the documents' commands that install something work on a machine that has nothing yet?

Runs every block that is marked `bash install`, in the order of the pages, in a copy of the checkout
with a virtual environment and a cache of modules of its own; pip goes by constraints.txt, in isolated
builds as well. Left out are blocks whose every command is a line of `.ci/run`.

One block builds for an AMD GPU, which takes a hipcc: `.ci/rocm` installs one.

Rejected: running in the checkout, where prebuilt modules would stay behind and be found by the tests;
an environment for each page, which installs PyTorch again for each (25 to 35 s on 2 cores).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "op_tests"))

from doc_blocks import blocks, is_step_of_ci  # noqa: E402

LEFT_OUT = ("PYTHONPATH", "PYTHONHOME", "GPU_ARCHS", "PREBUILD_KERNELS")  # variables


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        copy_checkout(checkout)
        variables = fresh_environment(Path(folder), checkout)
        for block in blocks():
            if block.marks != "install":
                continue
            if is_step_of_ci(block):
                print(f"-- {block}: a step of .ci/run", flush=True)
                continue
            print(f"-- {block}", flush=True)
            start = time.monotonic()
            command = ["bash", "-ec", block.text]
            status = subprocess.run(command, cwd=checkout, env=variables, check=False).returncode
            print(f"-- exit status {status}, {time.monotonic() - start:.0f} s", flush=True)
            if status != 0:
                return 1
    return 0


def copy_checkout(target: Path) -> None:
    """Copies the files that git does not ignore, as they are now."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # NOTE: one that was removed is listed until it is committed.
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def fresh_environment(work: Path, checkout: Path) -> dict[str, str]:
    """Makes a virtual environment in `work`; returns the variables that activate it."""
    environment = work / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    return {name: value for name, value in os.environ.items() if name not in LEFT_OUT} | {
        "VIRTUAL_ENV": str(environment),
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "AITER_JIT_DIR": str(work / "jit"),
        "PIP_CONSTRAINT": str(checkout / "constraints.txt"),
    }


if __name__ == "__main__":
    sys.exit(main())
