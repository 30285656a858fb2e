"""What does the loader accept in the compiler config, and how does it refuse the rest?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from toy import MODULE, Toy

from aiter.jit import paths, spec
from aiter.jit.errors import ConfigError, TargetError
from aiter.jit.spec import SETTINGS, load_config, load_spec, module_names, render
from aiter.jit.target import KINDS, Target

TARGETS = (Target("cpu", ("wave64",)), Target("cuda", ("sm_90",)), Target("rocm", ("gfx942",)))


def load(toy: Toy, **settings: Any) -> spec.ModuleSpec:
    toy.configure(**settings)
    return load_spec(toy.config_path, MODULE, toy.csrc, TARGETS[0])


def test_defaults(toy: Toy) -> None:
    loaded = load(toy)
    assert loaded.srcs == (toy.source,)
    assert loaded.targets == KINDS
    assert loaded.flags_extra_cc == ()
    assert not loaded.verbose


@pytest.mark.parametrize("built_for", TARGETS, ids=lambda target: target.kind)
def test_every_op_is_in_the_packages_own_config(built_for: Target) -> None:
    """What `build --all`, wheels and `warmup` go by: what the ops ask for, no more and no less."""
    ops = Path(paths.__file__).parents[1] / "ops"
    asked = {
        name
        for source in ops.glob("*.py")
        for name in re.findall(r'"(module_[a-z_]+)"', source.read_text())
    }
    names = module_names(paths.config_path(), paths.csrc_dir())
    assert asked == set(names) and len(names) == len(asked)
    for name in names:
        loaded = load_spec(paths.config_path(), name, paths.csrc_dir(), built_for)
        assert f"{name.removeprefix('module_')}_pybind.cpp" in {src.name for src in loaded.srcs}


@pytest.mark.parametrize("built_for", TARGETS, ids=lambda target: target.kind)
def test_the_packages_own_config_is_valid(built_for: Target) -> None:
    names = module_names(paths.config_path(), paths.csrc_dir())
    assert names[0] == "module_fused_topk_moe_sorting"
    for name in names:
        loaded = load_spec(paths.config_path(), name, paths.csrc_dir(), built_for)
        assert built_for.kind in loaded.targets


def test_schema_agrees_with_the_settings() -> None:
    path = paths.config_path().with_name("optCompilerConfig.schema.json")
    schema = json.loads(path.read_text())["additionalProperties"]
    assert list(schema["properties"]) == list(SETTINGS)
    assert schema["required"] == ["srcs"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["targets"]["items"]["enum"] == list(KINDS)
    types = {key: entry["type"] for key, entry in schema["properties"].items()}
    assert types.pop("verbose") == "boolean"
    assert types.pop("template_args") == "object"
    assert set(types.values()) == {"array"}
    assert all("description" in entry for entry in schema["properties"].values())


WRONG = [
    ({"flags": ["-g"]}, r"key flags: expected one of srcs, .*, got this key with value \['-g'\]"),
    ({"srcs": []}, "key srcs: expected at least one source file, got none"),
    ({"srcs": [""]}, "key srcs: expected at least one source file, got none"),
    ({"srcs": ["/" + "a" * 5000]}, "key srcs: expected a file that exists, got '/aaa"),
    ({"srcs": "a.cpp"}, "key srcs: expected a list of strings, got 'a.cpp'"),
    ({"flags_extra_cc": ["-g", 3]}, r"key flags_extra_cc: expected a list of strings, got \["),
    ({"verbose": "yes"}, "key verbose: expected true or false, got 'yes'"),
    ({"verbose": 1}, "key verbose: expected true or false, got 1"),
    (
        {"srcs": ["{{ AITER_CSRC_DIR }}/nope.cpp"]},
        "key srcs: expected a file that exists, got '.*nope",
    ),
    ({"srcs": ["toy.cpp"]}, "key srcs: expected an absolute path, such as .*AITER_CSRC_DIR"),
    ({"extra_include": ["/nope"]}, "key extra_include: expected a folder that exists, got '/nope'"),
    ({"flags_extra_cc": ["-D{{ NOPE }}"]}, "key flags_extra_cc: .*'-D{{ NOPE }}'.*'NOPE' is undef"),
    ({"flags_extra_cc": ["{{ AITER_TARGET"]}, "key flags_extra_cc: .*unexpected end of template"),
    ({"flags_extra_cc": ["{{ 1 // 0 }}"]}, "key flags_extra_cc: .*division or modulo by zero"),
    (
        {"flags_extra_cc": ["{{ AITER_TARGET.__class__.__mro__ }}"]},
        "key flags_extra_cc: .*unsafe",
    ),
    ({"targets": ["cpu", "tpu"]}, "key targets: expected any of cpu, cuda, rocm, got 'tpu'"),
    ({"template_args": ["a"]}, r"key template_args: expected an object, got \['a'\]"),
    ({"template_args": {"a b": 1}}, "key template_args: expected an identifier .* got 'a b'"),
    ({"template_args": {"true": 1}}, "key template_args: expected an identifier .* got 'true'"),
    ({"template_args": {"a": None}}, "key template_args.a: expected a string, number or boolean"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_wrong_settings_name_module_key_and_value(
    toy: Toy, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"module {MODULE}, {message}"):
        load(toy, **settings)


BROKEN = [
    ('{"module_toy": {"srcs": [}}', r"line 1, column 26: expected JSON, got Expecting value"),
    ('{\n "module_toy": {"srcs": ["a"],}}', r"line 2, column \d+: expected JSON"),
    ('{"a": {"srcs": ["x"], "srcs": ["y"]}}', "expected each key once in an object, got 'srcs'"),
    ('{"a": {}, "a": {}}', "expected each key once in an object, got 'a' twice"),
    ("[1]", "expected an object of modules, got a list"),
    ('{"a-b": {}}', "expected an identifier of at most 100 characters as a module name, got 'a-b'"),
    ('{"module_toy": 3}', "module module_toy: expected an object of settings, got a number"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_broken_files_are_located(toy: Toy, text: str, message: str) -> None:
    toy.config_path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(toy.config_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a readable file, got .*No such file"):
        load_config(tmp_path / "nope.json")


def test_unknown_module_lists_the_known(toy: Toy) -> None:
    with pytest.raises(ConfigError, match=f"module module_x: expected one of {MODULE}"):
        load_spec(toy.config_path, "module_x", toy.csrc, TARGETS[0])


def test_a_mistake_in_another_module_does_not_matter(toy: Toy) -> None:
    good = json.loads(toy.config_path.read_text())
    toy.config_path.write_text(json.dumps({**good, "module_bad": {"nope": 1}}))
    assert load_spec(toy.config_path, MODULE, toy.csrc, TARGETS[0]).name == MODULE


def test_unsupported_target(toy: Toy) -> None:
    toy.configure(targets=["cuda"])
    with pytest.raises(TargetError, match=r"expected one of its targets \(cuda\), got cpu"):
        toy.loader().plan(MODULE, toy.target())


def test_an_item_that_renders_to_nothing_is_left_out(toy: Toy) -> None:
    flags = [
        "{% if AITER_TARGET == 'cpu' %}-DA{% endif %}",
        "{% if AITER_TARGET == 'x' %}b{% endif %}",
    ]
    assert load(toy, flags_extra_cc=flags).flags_extra_cc == ("-DA",)


VARIABLES: dict[str, spec.TemplateValue] = {
    "NAME": "a b",
    "NUMBER": 3,
    "REAL": 0.5,
    "YES": True,
    "EMPTY": "",
}


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "",
        "{{ NAME }}",
        "{{NAME}}x{{  NUMBER }}",
        "{{ REAL }}{{ YES }}[{{ EMPTY }}]",
        "line\n{{ NAME }}\n",
        "trailing\n\n",
        "a } b { c }} d",
        "%} #} {x}",
        "\t{{ NAME }}\t",
    ],
)
def test_the_short_way_gives_what_jinja2_gives(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = render(text, VARIABLES, "test")
    monkeypatch.setattr(spec, "_MARKUP", re.compile(""))
    assert render(text, VARIABLES, "test") == short


def test_an_op_without_an_entry_takes_the_common_one(toy: Toy) -> None:
    binding = toy.csrc / "pybind" / "extra_pybind.cpp"
    binding.parent.mkdir(exist_ok=True)
    binding.touch()
    known = list(load_config(toy.config_path))
    assert module_names(toy.config_path, toy.csrc) == known
    config = json.loads(toy.config_path.read_text())
    config["module_*"] = {"srcs": ["{{ AITER_CSRC_DIR }}/pybind/{{ AITER_OP }}_pybind.cpp"]}
    toy.config_path.write_text(json.dumps(config))
    assert module_names(toy.config_path, toy.csrc) == [*known, "module_extra"]
    assert load_spec(toy.config_path, "module_extra", toy.csrc, TARGETS[0]).srcs == (binding,)
