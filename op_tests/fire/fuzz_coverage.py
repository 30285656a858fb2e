"""Does coverage lead to a config that `fuzz.py` does not draw? The same judge, driven by atheris.

Run as `python op_tests/fire/fuzz_coverage.py -max_total_time=60` where atheris is installed; the
options are libFuzzer's. It changes texts byte by byte towards lines of the loader not reached
before, where `fuzz.py` changes values; it stops at the first finding and keeps the text.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import _checkout  # noqa: E402, F401

try:
    import atheris
except ImportError:
    sys.exit("fuzz_coverage.py: expected the package atheris, got none; pip install atheris")

with atheris.instrument_imports(include=["aiter.jit"]):
    from fuzz_loader import LoaderJudges


def main() -> None:
    """Hands the command line to libFuzzer, which does not return."""
    with tempfile.TemporaryDirectory() as folder:
        judges = LoaderJudges(Path(folder))

        def judge(data: bytes) -> None:
            judges.config_bytes(data)

        atheris.Setup(sys.argv, judge)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
