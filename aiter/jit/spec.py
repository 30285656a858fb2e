"""What does the compiler config say about a module?

`optCompilerConfig.json` maps module names to settings. A module's entry is checked against the
fields of `ModuleSpec` and rendered for one target. Values are plain JSON with named placeholders:
data, not code. Evaluating Python expressions from the file was rejected, as it makes a typo a stack
trace and the file unreadable for other tools.

A text whose only markup is plain `{{ NAME }}` is substituted here with one regular expression; the
rest goes through jinja2's sandbox with undefined names as errors. Both give the same text; the
short way exists because importing jinja2 costs about 35 ms, which a cache hit should not pay.

The entry `module_*` holds for every op without one of its own, so that an op with nothing special
about it needs no entry: its binding, `csrc/pybind/<op>_pybind.cpp`, is what announces it, and
`{{ AITER_OP }}` stands for its name.
"""

from __future__ import annotations

import json
import keyword
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .target import KINDS, Target

TemplateValue = str | int | float | bool

PREFIX = "module_"
EVERY_OP = "module_*"  # the entry for ops without one of their own
_BINDING = "{op}_pybind.cpp"

_PLACEHOLDER = re.compile(r"\{\{ *([A-Za-z_][A-Za-z0-9_]*) *\}\}")
_MARKUP = re.compile(r"\{\{|\{%|\{#|\r")
_LITERALS = {"true", "false", "none", "True", "False", "None", "self"}


@dataclass(frozen=True)
class ModuleSpec:
    """One module's settings, rendered for one target.

    Attributes:
        name: the module's name, also the name under which Python loads it.
        srcs: absolute source files; `.cu` holds device code, `.jinja` is rendered first.
        flags_extra_cc: flags of every C++ compile for the host.
        flags_extra_hip: flags of device-code sources on rocm.
        flags_extra_cuda: flags of device-code sources on cuda.
        flags_extra_cpu: flags of every source on cpu.
        extra_ldflags: flags of the link.
        extra_include: include folders, searched before the package's own.
        verbose: whether to show the compiler's commands and warnings.
        targets: the kinds of target that the module supports.
        template_args: names for the sources that end in `.jinja`.
    """

    name: str
    srcs: tuple[Path, ...]
    flags_extra_cc: tuple[str, ...] = ()
    flags_extra_hip: tuple[str, ...] = ()
    flags_extra_cuda: tuple[str, ...] = ()
    flags_extra_cpu: tuple[str, ...] = ()
    extra_ldflags: tuple[str, ...] = ()
    extra_include: tuple[Path, ...] = ()
    verbose: bool = False
    targets: tuple[str, ...] = KINDS
    template_args: Mapping[str, TemplateValue] = field(default_factory=dict)


SETTINGS = tuple(item.name for item in fields(ModuleSpec) if item.name != "name")
_STRING_LISTS = tuple(key for key in SETTINGS if key not in ("verbose", "template_args"))


def template_variables(name: str, csrc_dir: Path, target: Target) -> dict[str, TemplateValue]:
    """The names that every placeholder of the module `name` may use."""
    return {
        "AITER_OP": name.removeprefix(PREFIX),
        "AITER_CSRC_DIR": str(csrc_dir),
        "AITER_TARGET": target.kind,
        "AITER_ARCHS": ";".join(target.archs),
    }


def load_config(path: Path) -> dict[str, dict[str, Any]]:
    """The raw config: module name to settings, with nothing checked below the top level."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"compiler config {path}: expected a readable file, got {error}"
        ) from None
    try:
        config = json.loads(text, object_pairs_hook=_without_duplicates)
    except (RecursionError, MemoryError):
        raise ConfigError(
            f"compiler config {path}: expected JSON of ordinary depth, got {len(text)} characters"
            " that are nested too deep"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"compiler config {path}, line {error.lineno}, column {error.colno}:"
            f" expected JSON, got {error.msg}"
        ) from None
    except _DuplicateKey as error:
        raise ConfigError(
            f"compiler config {path}: expected each key once in an object, got {error} twice"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"compiler config {path}: expected numbers of ordinary size, got one that Python"
            f" refuses ({error})"
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(
            f"compiler config {path}: expected an object of modules, got {_json_type(config)}"
        )
    for name, settings in config.items():
        if name != EVERY_OP and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name):
            raise ConfigError(
                f"compiler config {path}: expected an identifier of at most 100 characters as a"
                f" module name, got {name!r}"
            )
        if not isinstance(settings, dict):
            raise ConfigError(
                f"module {name}: expected an object of settings, got {_json_type(settings)}"
            )
    return config


def load_spec(path: Path, name: str, csrc_dir: Path, target: Target) -> ModuleSpec:
    """The checked settings of the module `name`, rendered for `target`; raises ConfigError."""
    config = load_config(path)
    known = _names_in(config, csrc_dir)
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(
            f"{PREFIX}{name}", known, 1
        )
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"module {name}: expected one of {', '.join(known) or 'no modules'}, as in {path}{meant}"
        )
    settings = config.get(name, config.get(EVERY_OP, {}))
    return make_spec(name, settings, template_variables(name, csrc_dir, target))


def module_names(path: Path, csrc_dir: Path) -> list[str]:
    """The modules of the config in its order, then the ops that its entry `module_*` covers."""
    return _names_in(load_config(path), csrc_dir)


def _names_in(config: Mapping[str, Any], csrc_dir: Path) -> list[str]:
    names = [name for name in config if name != EVERY_OP]
    if EVERY_OP in config:
        suffix = _BINDING.format(op="")
        bindings = sorted((csrc_dir / "pybind").glob(_BINDING.format(op="*")))
        ops = (PREFIX + binding.name.removesuffix(suffix) for binding in bindings)
        names += [name for name in ops if name not in config]
    return names


def make_spec(
    name: str, settings: Mapping[str, Any], variables: Mapping[str, TemplateValue]
) -> ModuleSpec:
    """Checks and renders the raw `settings` of the module `name`; raises ConfigError."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in SETTINGS:
            raise ConfigError(
                f"module {name}, key {key}: expected one of {', '.join(SETTINGS)}, got this key"
                f" with value {value!r}"
            )
        values[key] = _checked(name, key, value)
    for key in _STRING_LISTS:
        rendered = (
            render(text, variables, f"module {name}, key {key}") for text in values.get(key, ())
        )
        if key in values:
            # NOTE: a text that renders to nothing is left out, so that a condition can drop a flag.
            values[key] = tuple(_passable(name, key, text) for text in rendered if text)
    if not values.get("srcs"):
        raise ConfigError(f"module {name}, key srcs: expected at least one source file, got none")
    for key in ("srcs", "extra_include"):
        values[key] = tuple(_existing(name, key, text) for text in values.get(key, ()))
    unknown = [kind for kind in values.get("targets", ()) if kind not in KINDS]
    if unknown:
        raise ConfigError(
            f"module {name}, key targets: expected any of {', '.join(KINDS)}, got {unknown[0]!r}"
        )
    return ModuleSpec(name=name, **values)


def render(text: str, variables: Mapping[str, TemplateValue], where: str) -> str:
    """Fills the placeholders of `text`; `where` begins the message of a ConfigError."""
    if not _MARKUP.search(text):
        return text
    names = set(_PLACEHOLDER.findall(text))
    if names <= set(variables) and not _MARKUP.search(_PLACEHOLDER.sub("", text)):
        return _PLACEHOLDER.sub(lambda match: str(variables[match[1]]), text)

    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(text).render(dict(variables))
    except (
        Exception
    ) as error:  # NOTE: an expression can raise anything; all of it is the text's fault.
        shown = text if len(text) <= 200 else f"a text of {len(text)} characters"
        raise ConfigError(
            f"{where}: expected placeholders among {', '.join(variables)}, got {shown!r} ({error})"
        ) from None


class _DuplicateKey(Exception):
    """Carries the key that occurs twice out of the JSON parser."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(repr(key))
        result[key] = value
    return result


def _checked(name: str, key: str, value: Any) -> Any:
    """`value` with lists as tuples, if it has the type that `key` calls for."""
    where = f"module {name}, key {key}"
    if key == "verbose":
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: expected true or false, got {value!r}")
        return value
    if key == "template_args":
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected an object, got {value!r}")
        for arg, arg_value in value.items():
            if not arg.isidentifier() or keyword.iskeyword(arg) or arg in _LITERALS:
                raise ConfigError(f"{where}: expected an identifier as a name, got {arg!r}")
            if not isinstance(arg_value, (str, int, float, bool)):
                raise ConfigError(
                    f"{where}.{arg}: expected a string, number or boolean, got {arg_value!r}"
                )
        return value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ConfigError(f"{where}: expected a list of strings, got {value!r}")
    return tuple(value)


def _passable(name: str, key: str, text: str) -> str:
    """`text` if it can be an argument of a program; raises ConfigError."""
    try:
        fits = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise ConfigError(
            f"module {name}, key {key}: expected text that a command line can hold, got {text!r}"
        )
    return text


def _existing(name: str, key: str, text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise ConfigError(
            f"module {name}, key {key}: expected an absolute path, such as"
            f" '{{{{ AITER_CSRC_DIR }}}}/{text}', got {text!r}"
        )
    kind = "a file" if key == "srcs" else "a folder"
    try:
        exists = path.is_file() if key == "srcs" else path.is_dir()
    except OSError:  # NOTE: as for a name that is too long.
        exists = False
    if not exists:
        raise ConfigError(f"module {name}, key {key}: expected {kind} that exists, got {text!r}")
    return path


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")
