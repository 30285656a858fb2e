"""Does the command line say what it did, and exit as it should?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from toy import MODULE, Toy, child_environment

from aiter.cli.main import main
from aiter.cli.table import format_table
from aiter.jit import envs, paths
from aiter.jit.device_code import DEVICE_CODE_DIR
from aiter.jit.load import default_loader
from aiter.jit.target import cpu_level, cpu_target


@pytest.fixture
def installed(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """The toy tree in the place of the package's own."""
    monkeypatch.setattr(paths, "config_path", lambda: toy.config_path)
    monkeypatch.setattr(paths, "csrc_dir", lambda: toy.csrc)
    monkeypatch.setenv("AITER_JIT_DIR", str(toy.jit_dir))
    default_loader.cache_clear()
    yield toy
    default_loader.cache_clear()


Output = pytest.CaptureFixture[str]


def test_env(installed: Toy, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "zero")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for variable in envs.VARIABLES:
        assert variable.name in out
    assert str(installed.cache_dir) in out
    assert "g++ on PATH" in out
    assert "wrong: environment variable MAX_JOBS: expected a whole number" in out


def test_list(installed: Toy, capsys: Output) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == [
        MODULE,
        "cpu,",
        "cuda,",
        "rocm",
        "toy.cpp",
    ]


def test_list_reports_a_wrong_module_and_goes_on(installed: Toy, capsys: Output) -> None:
    config = json.loads(installed.config_path.read_text())
    installed.config_path.write_text(json.dumps({"module_bad": {"srcs": [1]}, **config}))
    assert main(["list"]) == 1
    captured = capsys.readouterr()
    assert MODULE in captured.out
    assert captured.err == (
        "error: module module_bad, key srcs: expected a list of strings, got [1]\n"
    )


def test_build_status_clean(installed: Toy, capsys: Output) -> None:
    assert main(["status"]) == 0
    assert "no builds" in capsys.readouterr().out
    assert main(["build", MODULE]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[2].split()[:2] == [MODULE, "built"]
    assert str(installed.builds()[0]) in out
    assert main(["build", "--all", "--arch", "wave64"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == [MODULE, "cached"]
    assert main(["build", MODULE, "--arch", "wave32"]) == 0
    capsys.readouterr()

    assert main(["status"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    archs = [",".join(filter(None, (wave, cpu_level()))) for wave in ("wave32", "wave64")]
    assert [row[:3] for row in rows] == [[MODULE, "cpu", arch] for arch in archs]
    assert all(row[-1] == "valid" for row in rows)

    installed.inner.write_text("#define TOY_VALUE 2\n")
    assert main(["build", MODULE]) == 0
    library = next((installed.cache_dir / MODULE).glob("cpu-wave32*/*/*/*.so"))
    library.write_bytes(b"")
    capsys.readouterr()
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "damaged: expected" in out
    assert "stale: csrc/include/inner.h changed" in out
    assert out.count("valid") == 1

    text = installed.cache_dir / DEVICE_CODE_DIR / "toy" / "gfx942" / "0123.s"
    text.parent.mkdir(parents=True)
    text.touch()
    assert main(["clean"]) == 0
    assert "removed 2 builds" in capsys.readouterr().out
    assert not (installed.cache_dir / DEVICE_CODE_DIR).exists()
    assert len(installed.builds()) == 1
    assert main(["clean", "--all"]) == 0
    assert "removed 1 builds" in capsys.readouterr().out
    assert not (installed.cache_dir / MODULE).exists()


def test_compile_commands_are_what_the_loader_would_run(installed: Toy, capsys: Output) -> None:
    output = installed.root / "compile_commands.json"
    assert main(["build", f"--compile-commands={output}"]) == 0
    assert f"1 sources for {cpu_target().label}" in capsys.readouterr().out
    assert installed.builds() == []
    (entry,) = json.loads(output.read_text())
    assert entry["file"] == str(installed.source)
    (source,) = default_loader().plan(MODULE, cpu_target()).sources
    assert entry["arguments"][1:] == [*source.flags, "-c", str(installed.source)]
    command = [*entry["arguments"], "-fsyntax-only"]
    subprocess.run(command, cwd=entry["directory"], check=True)


def test_compile_commands_of_the_package_name_every_source(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AITER_JIT_DIR", str(tmp_path))
    default_loader.cache_clear()
    output = tmp_path / "compile_commands.json"
    assert main(["build", "--all", "--compile-commands", str(output)]) == 0
    files = [Path(entry["file"]) for entry in json.loads(output.read_text())]
    assert len(files) == len(set(files))
    folders = [paths.csrc_dir() / name for name in ("kernels", "pybind")]
    for source in (path for folder in folders for path in folder.iterdir()):
        assert source in files
    default_loader.cache_clear()


def test_compile_commands_want_a_json_file(installed: Toy, capsys: Output) -> None:
    assert main(["build", "--compile-commands", MODULE]) == 2
    assert "expected a file that ends in .json, got module_toy" in capsys.readouterr().err
    installed.configure(targets=["rocm"])
    output = installed.root / "none.json"
    assert main(["build", f"--compile-commands={output}"]) == 0
    assert "left out, as not for cpu: module_toy" in capsys.readouterr().out


def test_force_builds_again(installed: Toy, capsys: Output) -> None:
    main(["build", MODULE])
    before = next(installed.builds()[0].glob("*.so")).stat().st_ino
    assert main(["build", MODULE, "--force"]) == 0
    (folder,) = installed.builds()
    assert next(folder.glob("*.so")).stat().st_ino != before


def test_status_tells_checked_builds_from_others(
    installed: Toy, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["build", MODULE, "--arch", " wave64 ; "]) == 0
    monkeypatch.setenv("AITER_CPU_CHECK", "address")
    assert main(["build", MODULE, "--arch", "wave64"]) == 0
    capsys.readouterr()
    assert main(["status"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    plain = ",".join(filter(None, ("wave64", cpu_level())))
    assert sorted(row[2] for row in rows) == [plain, f"{plain},address"]


def test_a_failed_build_is_one_message(installed: Toy, capsys: Output) -> None:
    installed.source.write_text("#error no good\n")
    assert main(["build", MODULE]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"error: building {MODULE} for cpu-wave64" in captured.err
    assert "#error no good" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["build"], 2, "error: expected module names or --all, got neither"),
        (["build", MODULE, "--all"], 2, "error: expected module names or --all, got both"),
        (["build", "module_x"], 1, f"error: module module_x: expected one of {MODULE}"),
        (["build", MODULE, "--arch", "sm_90"], 1, "error: architecture of cpu: expected wave64 or"),
    ],
)
def test_refused_commands(
    installed: Toy, capsys: Output, argv: list[str], status: int, message: str
) -> None:
    assert main(argv) == status
    assert message in capsys.readouterr().err


def test_a_wrong_command_line_exits_with_two(capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["nonsense"])
    assert caught.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_demo_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    demo = ModuleType("aiter.cli.demo")

    def demo_main(argv: list[str]) -> int:
        seen.append(argv)
        return 3

    demo.main = demo_main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aiter.cli.demo", demo)
    assert main(["demo", "--help", "x"]) == 3
    assert seen == [["--help", "x"]]


def test_the_module_runs_and_its_status_is_the_processs(toy: Toy) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aiter", "build", "module_x"],
        env=child_environment(AITER_JIT_DIR=str(toy.jit_dir)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: module module_x: expected one of module_fused_topk")


def test_a_bad_variable_is_one_message(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_JIT_DIR", "relative")
    default_loader.cache_clear()
    assert main(["status"]) == 1
    assert capsys.readouterr().err == (
        "error: environment variable AITER_JIT_DIR: expected an absolute path, got 'relative'\n"
    )


def test_format_table() -> None:
    table = format_table(
        ("name", "time", "note"), [("a", "9.5 us", ""), ("long name", "12.0 us", 3)]
    )
    assert table.splitlines() == [
        "name          time  note",
        "---------  -------  ----",
        "a           9.5 us",
        "long name  12.0 us     3",
    ]
    assert format_table(("only", "head"), []) == "only  head\n----  ----"
    with pytest.raises(ValueError, match="expected 2 cells, got 1"):
        format_table(("a", "b"), [("x",)])


WIDE = (("name", "count", "what it is for"), [
    ("first", "12", "a sentence that is a good deal longer than a narrow terminal is wide"),
    ("second", "3", "/a/path/" + "without/any/space/" * 4),
])  # fmt: skip


@pytest.mark.parametrize("width", [1, 20, 29, 30, 40, 60, 93, 94, 200])
def test_a_table_is_as_wide_as_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    table = format_table(*WIDE)
    assert table == format_table(*WIDE, width=width)
    assert max(map(len, table.splitlines())) <= width


def test_a_table_for_other_programs_has_a_line_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert len(format_table(*WIDE).splitlines()) == 4


def test_a_narrow_table_keeps_every_word(capsys: Output) -> None:
    """Columns are wrapped where they stay readable, else each row becomes lines."""
    wrapped = format_table(*WIDE, width=50).splitlines()
    assert wrapped[0] == "name    count  what it is for"
    assert [line[:13].strip() for line in wrapped[2:] if line[:13].strip()] == [
        "first      12",
        "second      3",
    ]
    records = format_table(*WIDE, width=22).split("\n\n")
    assert records[0].splitlines()[:3] == ["name: first", "count: 12", "what it is for: a"]
    assert " ".join(records[0].splitlines()[2:]) == f"what it is for: {WIDE[1][0][2]}"
