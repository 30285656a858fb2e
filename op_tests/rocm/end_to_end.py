"""Does the rocm path work end to end with a real hipcc, on a machine without an AMD GPU?

    python op_tests/rocm/end_to_end.py [--arch 'gfx90a;gfx906']

Builds every module through the loader as a user's process would (detection, compile, link), imports
it, and then does what needs a GPU: asking for the largest M and launching, both of which have to fail
with an error that says so. `.ci/rocm` installs hipcc and runs this.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from aiter.cli.table import format_table
from aiter.jit.compilers import find_compiler
from aiter.jit.load import default_loader
from aiter.jit.target import named_target


@dataclass
class FakeDevice:
    """A device as a ROCm build of PyTorch would name it."""

    type: str = "cuda"
    index: int = 0


class FakeGpuTensor:
    """What a binding reads off a tensor, claiming that the memory is a GPU's."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.device = FakeDevice()
        self.data_ptr = tensor.data_ptr
        self.stride = tensor.stride
        self.element_size = tensor.element_size
        self.is_neg = tensor.is_neg


def launch_error(module: ModuleType) -> str:
    """The message of a launch without a GPU; raises RuntimeError if there is none."""
    m, e, k, b = 4, 8, 2, 32
    slots = m * k + e * b - k
    arguments = [
        FakeGpuTensor(tensor)
        for tensor in (
            torch.zeros(m, e),
            torch.zeros(slots, dtype=torch.int32),
            torch.zeros(slots),
            torch.zeros(-(-slots // b), dtype=torch.int32),
            torch.zeros(2, dtype=torch.int32),
            torch.zeros(m, 16),
        )
    ]
    # A PyTorch without GPU support has no streams; the null stream stands in for its answer.
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # type: ignore[attr-defined]
    return message_of(lambda: module.fused_topk_moe_sorting_fwd(*arguments, e, k, b, True))


def message_of(call: object) -> str:
    try:
        call()  # type: ignore[operator]
    except RuntimeError as error:
        return str(error)
    raise AssertionError("expected an error on a machine without a GPU, got none")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--arch", default="gfx90a", help="for hipcc: gfx90a or 'gfx90a;gfx906'")
    options = parser.parse_args()
    compiler = find_compiler("rocm")
    print(f"compiler: {' '.join(compiler.command)} ({compiler.found_by})")
    target = named_target("rocm", tuple(options.arch.split(";")))
    loader = default_loader()
    rows = []
    loaded = {}
    for name in loader.modules():
        entry, built = loader.ensure(name, target)
        loaded[name] = loader.load(name, target)
        size = f"{entry.library.stat().st_size >> 10} KiB"
        functions = ", ".join(n for n in dir(loaded[name]) if not n.startswith("_"))
        rows.append((name, target.label, "built" if built else "cached", size, functions))
    print(format_table(("module", "target", "result", "size", "functions"), rows))
    fused = loaded["module_fused_topk_moe_sorting"]
    if torch.version.hip and torch.cuda.is_available():
        print("a GPU is here: `python -m aiter selftest` checks the rest")
        return 0
    errors = {
        "max_tokens": message_of(lambda: fused.fused_topk_moe_sorting_max_tokens(128, 4, 0)),
        "launch": launch_error(fused),
    }
    print(format_table(("without a GPU", "error"), list(errors.items())))
    expected = "GPUs that the runtime sees: 0"
    wrong = [call for call, text in errors.items() if expected not in text]
    if wrong:
        print(f"expected errors that say '{expected}', got others: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
