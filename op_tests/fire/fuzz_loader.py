"""Which texts and files does the fuzzer give to the loader, and what may come of them?

One method of `LoaderJudges` per kind: it draws an input, calls the loader and returns what happened
in a word. What a method lets through as an exception is a finding, and so is a result that it can
show to be wrong.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiter.jit import compilers, envs
from aiter.jit.cache import MANIFEST, Cache, Entry, file_sha256, read_manifest
from aiter.jit.driver import parse_depfile
from aiter.jit.errors import CacheError, ConfigError, EnvError, TargetError
from aiter.jit.plan import Plan, make_plan
from aiter.jit.prebuilt import find_prebuilt
from aiter.jit.spec import SETTINGS, ModuleSpec, load_spec, module_names, render, template_variables
from aiter.jit.target import KINDS, Target, covers

MODULE = "module_fuzzed"
TARGET = Target("cpu", ("wave64",), "x86-64-v2")
TARGETS = (TARGET, Target("cuda", ("sm_90",)), Target("rocm", ("gfx942", "gfx90a:xnack+")))

WORDS = (
    *SETTINGS, MODULE, "module_*", "srcs", "{{ AITER_CSRC_DIR }}/fuzzed.cpp", "{{ AITER_OP }}",
    "{{AITER_TARGET}}", "{% if AITER_TARGET == 'cpu' %}-O2{% endif %}", "{{ nothing }}", "-DX=1",
    "cpu", "cuda", "rocm", "\0", "\ud800", "../../etc/passwd", "/", "", "é", "a" * 300, "{{", "%}",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**64), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"))


class LoaderJudges:
    """The judges of everything that the loader reads.

    Args:
        folder: an empty folder of this process.
    """

    def __init__(self, folder: Path) -> None:
        logging.getLogger("aiter").setLevel(logging.CRITICAL)
        self.folder = folder
        self.csrc = folder / "csrc"
        (self.csrc / "include").mkdir(parents=True)
        (self.csrc / "pybind").mkdir()
        self.config = folder / "config.json"
        (self.csrc / "fuzzed.cpp").write_text("int value;\n")
        self.header = self.csrc / "include" / "fuzzed.h"
        self.header.write_text("#define VALUE 1\n")
        self.valid_config = {
            MODULE: {
                "srcs": ["{{ AITER_CSRC_DIR }}/fuzzed.cpp"],
                "extra_include": ["{{ AITER_CSRC_DIR }}/include"],
                "flags_extra_cpu": ["-DTARGET={{ AITER_TARGET }}"],
                "template_args": {"WIDTH": 4},
                "targets": ["cpu", "cuda", "rocm"],
                "verbose": False,
            }
        }
        self.config.write_text(json.dumps(self.valid_config))
        compiler = {"compiler": ["gcc", ["/usr/bin/g++", "g++ 12"]], "variables": {}}
        self.plan = make_plan(self.config, self.csrc, folder, MODULE, TARGET, compiler)
        self.cache = Cache(folder / "cache")
        self.build, self.manifest = _fake_build(self.cache, self.plan, self.header)

    def judge(self, kind: str) -> Callable[[random.Random], str]:
        """The judge of a kind, by its name."""
        return {
            "config": lambda rng: self.config_text(self.draw_config(rng)),
            "template": self.template,
            "target": self.target,
            "variable": self.variable,
            "depfile": self.depfile,
            "compiler memo": self.compiler_memo,
            "manifest": self.manifest_lookup,
            "prebuilt": self.prebuilt,
        }[kind]

    def config_text(self, text: str) -> str:
        """Judges one text as the compiler config."""
        return self.config_bytes(text.encode("utf-8", "surrogatepass"))

    def config_bytes(self, data: bytes) -> str:
        """Judges the contents of a file as the compiler config."""
        (self.folder / "drawn.json").write_bytes(data)
        try:
            path = self.folder / "drawn.json"
            names = module_names(path, self.csrc)
            for name in (*names[:3], MODULE):
                _check_spec(load_spec(path, name, self.csrc, TARGETS[len(data) % len(TARGETS)]))
        except ConfigError:
            return "ConfigError"
        return "accepted"

    # The kinds.

    def variable(self, rng: random.Random) -> str:
        """A value of an environment variable."""
        entry = rng.choice(envs.VARIABLES)
        parts = ("1", "0", "on", "gfx942", "gfx90a:xnack+", "sm_90", ";", ",", "native", "/tmp", "~",
                 "64", "-3", "1e9", "inf", "race", "DEBUG", " ", "٣", "x" * 50)  # fmt: skip
        text = "".join(rng.choices(parts, k=rng.randint(0, 4))) or rng.choice(
            ("é", "{", "~nobody-", "-")
        )
        before = os.environ.get(entry.name)
        try:
            os.environ[entry.name] = text
            value = entry.get()
        except EnvError as error:
            assert entry.name in str(error) and "expected" in str(error), str(error)
            return "EnvError"
        finally:
            os.environ.pop(entry.name)
            if before is not None:
                os.environ[entry.name] = before
        if isinstance(value, Path):
            assert value.is_absolute(), value
        if entry is envs.GPU_ARCHS:
            assert all(";" not in arch and "/" not in arch for arch in value), value
        return "accepted"

    def target(self, rng: random.Random) -> str:
        """A target's parts, and whether its code runs on a device."""
        names = ("wave64", "wave32", "sm_90", "sm_90a", "sm_", "gfx942", "gfx90a:xnack+:sramecc-",
                 "gfx", "../x", "wave64\n", "", "sm_٣", "gfx942:", "-rf", "a;b")  # fmt: skip
        kind = rng.choice((*KINDS, rng.choice(("gpu", ""))))
        if rng.random() < 0.6:
            names = {"cpu": names[:2], "cuda": names[2:4], "rocm": names[5:7]}.get(kind, names)
        archs = tuple(rng.choice(names) for _ in range(rng.choice((0, 1, 1, 1, 2, 3))))
        if rng.random() < 0.3:
            archs = tuple(_changed_text(rng, arch) for arch in archs)
        try:
            built = Target(kind, archs, "", rng.choice(("", "", "", "race", "address", "x")))
        except TargetError:
            return "TargetError"
        assert built.label.isprintable() and not set(built.label) & set("/\\ ;\n\0"), built.label
        assert built.kind in KINDS and built.archs == archs
        device = rng.choice(("sm_90", "sm_86", "gfx942:sramecc+:xnack-", "gfx90a"))
        if built.kind != "cpu" and built.archs[0][:2] == device[:2]:
            assert covers(built.archs[0], device) in (True, False)
        return "accepted"

    def template(self, rng: random.Random) -> str:
        """A text with placeholders."""
        pieces = ("{{ AITER_OP }}", "{{AITER_TARGET}}", "{{ nope }}", "{{", "}}", "{%", "%}", "{#",
                  "{% if AITER_TARGET %}", "{% endif %}", "{{ 1/0 }}", "{{ AITER_OP.__class__ }}",
                  "{{ ''.__class__.__mro__ }}", "{{ AITER_OP | upper }}", "{{ AITER_OP | nope }}",
                  "{% import 'os' as os %}", "{{ self }}", "{{ range(3) | list }}", "text", "\r\n",
                  "{% raw %}", "{% set x = 1 %}", "{{ x }}", "{{ cycler.__init__ }}")  # fmt: skip
        text = "".join(rng.choices(pieces, k=rng.randint(0, 4)))
        variables = template_variables(MODULE, self.csrc, TARGET)
        try:
            rendered = render(text, variables, "text")
        except ConfigError as error:
            assert str(error).startswith("text: expected placeholders among"), str(error)
            return "ConfigError"
        for secret in ("<class", "<function", "<bound", "<module"):
            assert secret not in rendered, f"{text!r} gave {rendered!r}"
        return "accepted"

    def draw_config(self, rng: random.Random) -> str:
        """The text of a config: a valid one with changes, as JSON or damaged below that."""
        config = copy.deepcopy(self.valid_config)
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            config = _changed_json(rng, config)
        text = json.dumps(config, ensure_ascii=rng.random() < 0.5)
        return _changed_text(rng, text) if rng.random() < 0.3 else text

    def depfile(self, rng: random.Random) -> str:
        """What a compiler says it read: names come back as they were written, whatever they are."""
        letters = "ab /.$#é\t-_+~'\"%&()*[]{}!?"
        names = [
            "".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(rng.randint(0, 5))
        ]
        names = list(dict.fromkeys(name for name in names if name == name.strip()))
        quoted = [name.replace("$", "$$").replace("#", "\\#").replace(" ", "\\ ") for name in names]
        found = parse_depfile("x.o: " + rng.choice((" ", " \\\n ")).join(quoted) + "\n")
        if not any("\t" in name for name in names):
            assert found == names, f"expected {names}, got {found}"
        for name in parse_depfile(_changed_text(rng, "x.o: " + " ".join(quoted))):
            assert isinstance(name, str) and name
        return "accepted"

    def compiler_memo(self, rng: random.Random) -> str:
        """What the cache remembers of a compiler: the exact text or nothing."""
        memo = self.folder / "memo.json"
        identity = [["/usr/bin/g++"], "/usr/bin/g++", 1000, 5]
        content = _changed_json(rng, {"identity": identity, "version": "g++ 12"})
        text = json.dumps(content)
        _write(memo, _changed_text(rng, text) if rng.random() < 0.5 else text)
        version = compilers._read_memo(memo, identity)
        if version is None:
            return "not used"
        known = json.loads(memo.read_text())
        assert known["identity"] == identity and known["version"] == version
        return "accepted"

    def manifest_lookup(self, rng: random.Random) -> str:
        """A build's manifest, looked up: used if it says nothing wrong, else set aside."""
        self._draw_build(rng)
        try:
            found = self.cache.lookup(self.plan)
        except CacheError:
            return "CacheError"
        if not isinstance(found, Entry):
            return "not used"
        _check_entry(found, self.plan)
        return "accepted"

    def prebuilt(self, rng: random.Random) -> str:
        """A prebuilt module's manifest."""
        self._draw_build(rng)
        found = find_prebuilt(self.cache.root, self.config, self.csrc, MODULE, TARGET)
        read_manifest(self.build)
        if found is None:
            return "not used"
        assert found.library.read_bytes() == LIBRARY, "a library of other bytes was accepted"
        return "accepted"

    def _draw_build(self, rng: random.Random) -> None:
        """Puts a build with a changed manifest, library or both in place."""
        for name in (".broken",):
            shutil.rmtree(self.cache.root / name, ignore_errors=True)
        self.build.mkdir(parents=True, exist_ok=True)
        library = self.build / self.plan.library_name
        library.write_bytes(LIBRARY)
        if rng.random() < 0.1:
            library.write_bytes(rng.choice((b"", LIBRARY[:-1], LIBRARY + b"x", LIBRARY[::-1])))
        manifest = copy.deepcopy(self.manifest)
        for _ in range(rng.choice((0, 1, 1, 2))):
            manifest = _changed_json(rng, manifest)
        text = json.dumps(manifest)
        _write(self.build / MANIFEST, _changed_text(rng, text) if rng.random() < 0.25 else text)


LIBRARY = bytes(range(256)) * 3
_TEXTS = ("", "\0", "é", "{", "}", "[" * 50, '"', "null", "-", "\ud800", "\u202e", "1" * 400, "\n")


def _fake_build(cache: Cache, plan: Plan, header: Path) -> tuple[Path, dict[str, Any]]:
    """A build in the cache whose library is no library; its folder and manifest."""
    folder = cache.make_folder(plan.place / "0123456789abcdef")
    (folder / plan.library_name).write_bytes(LIBRARY)
    status = header.stat()
    manifest = {
        "target": [TARGET.kind, list(TARGET.archs), TARGET.cpu_level, TARGET.cpu_check],
        "abi": plan.abi,
        "inputs": plan.inputs,
        "library": {
            "name": plan.library_name,
            "size": len(LIBRARY),
            "sha256": file_sha256(folder / plan.library_name),
        },
        "headers": [
            [
                plan.roots.shorten(str(header)),
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                file_sha256(header),
            ]
        ],
    }
    return folder, json.loads(json.dumps(manifest))


def _check_entry(entry: Entry, plan: Plan) -> None:
    """What is about to be loaded is the library that was built for the plan."""
    assert entry.manifest["inputs"] == plan.inputs, "a build for other inputs was accepted"
    assert entry.library.name == plan.library_name, "a library of another name was accepted"
    assert entry.library.read_bytes() == LIBRARY, "a library of other bytes was accepted"


def _check_spec(spec: ModuleSpec) -> None:
    """An accepted config gives files that exist and words that a command line can hold."""
    assert spec.srcs and all(path.is_absolute() and path.is_file() for path in spec.srcs)
    assert all(path.is_absolute() and path.is_dir() for path in spec.extra_include)
    assert set(spec.targets) <= set(KINDS) and isinstance(spec.verbose, bool)
    for flags in (spec.flags_extra_cc, spec.flags_extra_cpu, spec.extra_ldflags):
        assert all(flag and b"\0" not in os.fsencode(flag) for flag in flags), flags


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    path.chmod(0o600)


def _any_json(rng: random.Random, depth: int = 0) -> Any:
    """A small JSON value."""
    which = rng.randrange(8 if depth < 3 else 5)
    if which < 2:
        return rng.choice(WORDS)
    if which == 2:
        return rng.choice(NUMBERS)
    if which < 5:
        return rng.choice((None, True, False))
    if which == 5:
        return [_any_json(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice(WORDS): _any_json(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def _changed_json(rng: random.Random, value: Any) -> Any:
    """`value` with one part of it replaced, removed, doubled or added, at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        which = rng.random()
        if which < 0.7:
            value[key] = _changed_json(rng, value[key])
        elif which < 0.85:
            del value[key]
        else:
            value[rng.choice(WORDS)] = _any_json(rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        which = rng.random()
        if which < 0.7:
            value[index] = _changed_json(rng, value[index])
        elif which < 0.85:
            del value[index]
        else:
            value.insert(index, _any_json(rng))
        return value
    if isinstance(value, str) and rng.random() < 0.4:
        return _changed_text(rng, value)
    if isinstance(value, int) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 2**40))
    return _any_json(rng)


def _changed_text(rng: random.Random, text: str) -> str:
    """`text` with up to three places cut, doubled or overwritten."""
    for _ in range(rng.randint(0, 3)):
        at = rng.randint(0, len(text))
        end = min(len(text), at + rng.choice((0, 1, 1, 5, 50)))
        text = text[:at] + rng.choice(("", rng.choice(_TEXTS), text[at:end] * 2)) + text[end:]
    return text
