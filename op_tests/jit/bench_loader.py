"""What does the loader cost? Prints import, cold build, warm first call and per-call overhead.

Run as `python op_tests/jit/bench_loader.py`. Every figure but the cold build is the median over
processes or repeats, with the range; the cold build is one build of the fused module for the cpu
into an empty cache, so it depends on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = "module_fused_topk_moe_sorting"
PROCESSES = 7

FIRST_CALL = f"""
import json, sys, time
import torch
start = time.perf_counter()
import aiter
from aiter.jit import module_for
imported = time.perf_counter()
module_for({MODULE!r}, "cpu")
print(json.dumps([imported - start, time.perf_counter() - imported]))
"""

PER_CALL = """
import json, timeit
import torch
from aiter.jit import compile_ops

class Module:
    @staticmethod
    def op(tensor, number):
        return number

class Loader:
    def load(self, module, target):
        return Module

@compile_ops("module_x", loader=Loader())
def op(tensor: torch.Tensor, number: int) -> int:
    "Gives the number back."

tensor = torch.zeros(1)
direct = Module.op
count = 200_000
pairs = [(timeit.timeit(lambda: op(tensor, 1), number=count),
          timeit.timeit(lambda: direct(tensor, 1), number=count)) for _ in range(7)]
print(json.dumps([(wrapped - plain) / count for wrapped, plain in pairs]))
"""


def run(code: str, cache: str) -> list[float]:
    """The numbers that a Python process prints."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "AITER_JIT_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [float(number) for number in json.loads(done.stdout)]


def show(what: str, seconds: list[float], unit: str, scale: float) -> None:
    """One line of the result."""
    low, middle, high = (
        scale * value for value in (min(seconds), statistics.median(seconds), max(seconds))
    )
    print(f"{what:34} {middle:9.2f} {unit:2}  ({low:.2f} to {high:.2f}, n={len(seconds)})")


def main() -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as cache:
        cold = run(FIRST_CALL, cache)
        warm = [run(FIRST_CALL, cache) for _ in range(PROCESSES)]
        show("first call, cold build", cold[1:], "s", 1.0)
        show("first call, warm cache", [call for _, call in warm], "ms", 1e3)
        show("import aiter, on top of torch", [imported for imported, _ in warm], "ms", 1e3)
        show("later calls, on top of the call", run(PER_CALL, cache), "us", 1e6)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help, and no other
    main()
