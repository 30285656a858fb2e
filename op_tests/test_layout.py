"""Is the house in order? One shape per op, one platform seam, one reader of the environment.

A file above MOST_LINES or a function above MOST_FUNCTION_LINES has to say why: a line with
`Long because` in the file's header.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import _checkout  # noqa: F401  (makes a checkout importable)
import pytest

from aiter.jit.spec import module_names

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 400
MOST_FUNCTION_LINES = 60
HEADER_LINES = 40
SOURCE_SUFFIXES = (".py", ".h", ".cpp", ".cu")

# The six files of an op.
SHAPE = (
    "csrc/include/{op}.h",
    "csrc/kernels/{op}.cu",
    "csrc/pybind/{op}_pybind.cpp",
    "aiter/ops/{op}.py",
    "op_tests/test_{op}.py",
    "op_tests/bench_{op}.py",
)


def missing_files(root: Path, op: str) -> list[str]:
    """The files of an op's six that are not there."""
    paths = (shape.format(op=op) for shape in SHAPE)
    return [path for path in paths if not (root / path).is_file()]


def has_reason(text: str) -> bool:
    return "Long because" in "\n".join(text.splitlines()[:HEADER_LINES])


def long_python_functions(text: str) -> list[str]:
    """Functions above the limit, docstrings not counted."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            start = (first.end_lineno or 0) + 1 if documented else node.lineno
            length = (node.end_lineno or 0) - start + 1
            if length > MOST_FUNCTION_LINES:
                found.append(f"{node.name} ({length} lines)")
    return found


def long_cpp_functions(text: str) -> list[str]:
    """Bodies above the limit: from a line that starts at column 0 to the `}` at column 0."""
    found, start, name = [], 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"[\w:<>*&~\[\]_]", line) and not line.startswith(("namespace", "extern")):
            match = re.search(r"([\w:~]+)\s*\(", line)
            if match and start == 0:
                start, name = number, match[1]
        if line.startswith("}") and start:
            if number - start + 1 > MOST_FUNCTION_LINES and name not in ("class", "struct"):
                found.append(f"{name} ({number - start + 1} lines)")
            start = 0
        if line.endswith(";") and not line.startswith(" "):
            start = 0
    return found


def sources() -> Iterator[Path]:
    for top in ("aiter", "csrc", "op_tests", "setup.py"):
        path = ROOT / top
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        yield from (f for f in files if f.suffix in SOURCE_SUFFIXES and "_src" not in f.parts)


def test_every_op_has_its_six_files() -> None:
    config = ROOT / "jit_config" / "optCompilerConfig.json"
    ops = [name.removeprefix("module_") for name in module_names(config, ROOT / "csrc")]
    assert ops[0] == "fused_topk_moe_sorting" and "expert_load" in ops
    assert {op: missing_files(ROOT, op) for op in ops if missing_files(ROOT, op)} == {}


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    for shape in SHAPE[1:]:
        path = tmp_path / shape.format(op="toy")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert missing_files(tmp_path, "toy") == ["csrc/include/toy.h"]


def test_long_files_and_functions_have_a_reason() -> None:
    found = {}
    for path in sources():
        text = path.read_text()
        if has_reason(text):
            continue
        python = path.suffix == ".py"
        long = long_python_functions(text) if python else long_cpp_functions(text)
        if len(text.splitlines()) > MOST_LINES:
            long.append(f"the file ({len(text.splitlines())} lines)")
        if long:
            found[str(path.relative_to(ROOT))] = long
    assert found == {}


def test_long_functions_are_noticed() -> None:
    lines = "\n".join("    x = 1" for _ in range(MOST_FUNCTION_LINES + 1))
    assert long_python_functions(f"def f():\n{lines}\n") == [f"f ({MOST_FUNCTION_LINES + 2} lines)"]
    body = lines.replace("x = 1", "x = 1;")
    assert long_cpp_functions(f"int f(int x) {{\n{body}\n}}\n") == [
        f"f ({MOST_FUNCTION_LINES + 3} lines)"
    ]


@pytest.mark.parametrize("folder", ["csrc/include", "csrc/kernels", "csrc/pybind"])
def test_op_files_do_not_know_the_platform(folder: str) -> None:
    """Only csrc/include/device, csrc/include/target.h and csrc/cpu ask for the target."""
    asking = re.compile(r"#\s*if.*(AITER_TARGET|__HIP|__CUDA|__AMDGCN|__NVCC|__gfx)", re.IGNORECASE)
    lanes = re.compile(r"(lane|wave|threadIdx)\w*\s*[%/&<>=]+\s*(31|32|63|64)\b", re.IGNORECASE)
    for path in sorted((ROOT / folder).glob("*")):
        if path.is_dir() or path.name == "target.h":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not asking.search(line), f"{path.name}:{number} asks for the platform: {line}"
            assert not lanes.search(line), f"{path.name}:{number} has a literal wave width: {line}"


def test_only_one_module_reads_the_environment() -> None:
    reading = re.compile(r"os\.(environ|getenv)")
    readers = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.is_relative_to(ROOT / "aiter") and reading.search(path.read_text())
    ]
    assert readers == ["aiter/jit/envs.py"]


def test_no_torch_header_is_compiled() -> None:
    including = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10)/")
    assert [
        p.name
        for p in (ROOT / "csrc").rglob("*")
        if p.is_file() and including.search(p.read_text())
    ] == []
