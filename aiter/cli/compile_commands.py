"""How do editors learn the flags? `python -m aiter build --compile-commands [FILE]`.

Writes the usual JSON database from the plans that the loader would build by, so an editor sees what
the compiler sees. A source that several modules share has one entry, from the first of them;
templates have none, as what is compiled is their rendered text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from ..jit.errors import TargetError
from ..jit.load import Loader
from ..jit.target import Target


def run(loader: Loader, modules: Iterable[str], target: Target, output: Path) -> int:
    """Writes the database of `modules` for `target` to the file `output`; the exit status.

    Modules without such a target are left out. Raises the errors of `Loader.plan`.
    """
    if output.suffix != ".json":
        print(
            f"error: --compile-commands: expected a file that ends in .json, got {output}",
            file=sys.stderr,
        )
        return 2
    entries: dict[str, dict[str, object]] = {}
    left_out = []
    for module in modules:
        try:
            plan = loader.plan(module, target)
        except TargetError:
            left_out.append(module)
            continue
        for source in plan.sources:
            if source.rendered is None:
                words = [*plan.compiler.command, *source.flags, "-c", str(source.path)]
                entry = {"directory": str(loader.csrc_dir), "arguments": words}
                entries.setdefault(str(source.path), {**entry, "file": str(source.path)})
    output.write_text(json.dumps(list(entries.values()), indent=1) + "\n", encoding="utf-8")
    print(f"wrote the commands of {len(entries)} sources for {target.label} to {output}")
    if left_out:
        print(f"left out, as not for {target.kind}: {', '.join(left_out)}")
    return 0
