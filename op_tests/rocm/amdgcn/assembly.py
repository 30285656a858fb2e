"""The compiler's assembly text as a list of instructions with operands, modifiers and labels.

Only the syntax is dealt with here: what an instruction does is decided by `scalar`, `vector` and
`memory_ops`. Newer names of the same operation (gfx11: ds_load_b32, gfx12: s_add_co_i32) are mapped
to gfx9's, so that one implementation serves every architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from aiter.jit.device_kernels import (
    KernelCode,
    instruction_lines,
    kernel_body,
    parse_kernels,
)

_SUFFIXES = re.compile(r"(_e32|_e64)?(_dpp|_sdwa|_dpp8)?$")

_RENAMES = (
    (r"^(ds|global|flat|scratch)_load_", r"\1_read_"),
    (r"^(ds|global|flat|scratch)_store_", r"\1_write_"),
    (r"^(v_add|v_sub|v_subrev)_nc_", r"\1_"),
    (r"^(v_add|v_sub|v_subrev)_co_ci_", r"\1c_co_"),
    (r"^v_mad_co_", r"v_mad_"),
    (r"^s_add_co_ci_u32$", r"s_addc_u32"),
    (r"^s_sub_co_ci_u32$", r"s_subb_u32"),
    (r"^(s_add|s_sub|s_addk)_(?:co|nc)_", r"\1_"),
    (r"_and_not1_", r"_andn2_"),
    (r"_or_not1_", r"_orn2_"),
    (r"^s_ctz_i32", r"s_ff1_i32"),
    (r"^v_clz_i32_u32", r"v_ffbh_u32"),
    (r"^s_clz_i32_u32", r"s_flbit_i32_b32"),
    (r"^([sv]_max3?)_num_f32$", r"\1_f32"),
)
_CARRY = {"v_subc_co_u32": "v_subb_co_u32", "v_subrevc_co_u32": "v_subbrev_co_u32"}

_SIZES = {
    "dword": "b32", "dwordx2": "b64", "dwordx3": "b96", "dwordx4": "b128", "ubyte": "u8",
    "sbyte": "i8", "byte": "b8", "ushort": "u16", "sshort": "i16", "short": "b16",
    "short_d16": "d16_b16", "short_d16_hi": "d16_hi_b16", "u16_d16": "d16_b16",
    "u16_d16_hi": "d16_hi_b16", "2addr_b32": "2_b32", "2addr_b64": "2_b64",
    "2addr_stride64_b32": "2st64_b32", "2addr_stride64_b64": "2st64_b64",
    "dwordx8": "b256", "dwordx16": "b512",
}  # fmt: skip


@dataclass
class Instruction:
    """One instruction, or both halves of a dual one.

    Attributes:
        mnemonic: the canonical name, without an encoding suffix.
        operands: as written.
        modifiers: `name:value` pairs and flags (with an empty value).
        encoding: `dpp`, `sdwa` or empty.
        text: the line, for messages.
        line: its number in the kernel's body.
        second: the other half of a v_dual instruction.
    """

    mnemonic: str
    operands: list[str]
    modifiers: dict[str, str]
    encoding: str
    text: str
    line: int
    second: Instruction | None = None


@dataclass
class KernelText:
    """One kernel: its code, its launch state and the layout of its arguments.

    Attributes:
        code: what `parse_kernels` found.
        instructions: in order.
        labels: label to the index of the instruction that follows it.
        directives: the `.amdhsa_` values by name.
        arguments: (offset, size, kind) of every kernel argument, hidden ones included.
        preloaded_entry: the instruction at byte 256, where a wave begins whose arguments are in
            registers; 0 for a kernel that does not ask for that.
        decoded: where `machine` keeps what it made of the instructions.
    """

    code: KernelCode
    instructions: list[Instruction]
    labels: dict[str, int]
    directives: dict[str, int]
    arguments: list[tuple[int, int, str]] = field(default_factory=list)
    preloaded_entry: int = 0
    decoded: dict[int, Any] = field(default_factory=dict, compare=False)


class Kernels(Mapping[str, KernelText]):
    """The kernels of assembly texts by their readable names, as `topk_softmax<WaveRow<f32, 4>>`.

    Each is parsed when it is asked for first: a text of fifty takes seconds, and a test runs a few.
    """

    def __init__(self, texts: Iterable[str], arch: str) -> None:
        self._codes = {
            code.name: (text, code) for text in texts for code in parse_kernels(text, arch)
        }
        self._parsed: dict[str, KernelText] = {}

    def __getitem__(self, name: str) -> KernelText:
        if name not in self._parsed:
            self._parsed[name] = parse_kernel(*self._codes[name])
        return self._parsed[name]

    def lines(self, name: str) -> list[str]:
        """The instructions of a kernel as they are written, which takes no parsing."""
        text, code = self._codes[name]
        return instruction_lines(kernel_body(text, code.symbol))

    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)


def parse_kernel(text: str, code: KernelCode) -> KernelText:
    """One kernel of the assembly text."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    second_entry = 0
    high_bits = 0
    for number, line in enumerate(kernel_body(text, code.symbol).splitlines(), 1):
        stripped = line.partition(";")[0].strip()
        label = re.match(r"(\S+):$", stripped)
        if label is not None:
            labels[label[1]] = len(instructions)
        elif re.match(r"\.p2align\s+8\b", stripped):
            second_entry = len(instructions)
        elif stripped and not stripped.startswith("."):
            instructions.append(parse_instruction(whole_registers(stripped, high_bits), number))
            if instructions[-1].mnemonic == "s_set_vgpr_msb":
                high_bits = int(instructions[-1].operands[0], 0) & 0xFF
    _, _, directives = text.partition(f".amdhsa_kernel {code.symbol}\n")
    directives = directives.partition(".end_amdhsa_kernel")[0]
    values = {name: int(value) for name, value in re.findall(r"\.amdhsa_(\w+) (\d+)", directives)}
    if (second_entry != 0) != (values.get("user_sgpr_kernarg_preload_length", 0) != 0):
        raise ValueError(
            f"{code.name}: expected an entry at byte 256 with preloaded arguments, and only then"
        )
    return KernelText(
        code, instructions, labels, values, _arguments(text, code.symbol), second_entry
    )


def whole_registers(text: str, high_bits: int) -> str:
    """Vector registers from 256 on (gfx1250) by their own names, which comments give.

    An instruction has eight bits for each of them; two more, for one of its four places, are in
    `high_bits`, which `s_set_vgpr_msb` has set last.
    """

    def whole(match: re.Match[str]) -> str:
        encoded, register = int(match[1]), int(match[3])
        upper = {high_bits >> place & 3 for place in (0, 2, 4, 6)}
        if register % 256 != encoded or register // 256 not in upper:
            raise ValueError(f"`{text}`: expected registers as of s_set_vgpr_msb {high_bits}")
        return match[2]

    return re.sub(r"v\[?(\d+)\S* /\*(v\[?(\d+)[^*]*)\*/", whole, text)


def parse_instruction(text: str, line: int) -> Instruction:
    """One line without comment; a v_dual instruction gives its first half with `second` set."""
    if "::" in text:
        first, second = (half.strip().replace("v_dual_", "v_", 1) for half in text.split("::"))
        instruction = parse_instruction(first, line)
        instruction.second = parse_instruction(second, line)
        instruction.text = text
        return instruction
    name, _, rest = text.partition(" ")
    suffix = _SUFFIXES.search(name)
    encoding = (suffix[2] or "").strip("_") if suffix else ""
    operands: list[str] = []
    modifiers: dict[str, str] = {}
    if not name.startswith(("s_wait", "s_delay")):
        for part in _split(rest, ","):
            words = _split(part, " ")
            if words and not re.match(r"[a-z_0-9]+:", words[0]):
                operands.append(words.pop(0))
            for word in words:
                key, _, value = word.partition(":")
                modifiers[key] = value
    return Instruction(canonical(name[: suffix.start()] if suffix else name), operands, modifiers,
                       encoding, text, line)  # fmt: skip


@cache
def canonical(name: str) -> str:
    """gfx9's name of an operation that newer architectures spell differently."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    name = _CARRY.get(name, name)
    memory = re.match(r"(ds_read|ds_write|global_read|global_write|s_load)_?(.*)", name)
    if memory is not None:
        return f"{memory[1]}_{_SIZES.get(memory[2], memory[2])}"
    return name


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that are outside brackets, stripped, empty ones left out."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "[(") - (char in "])")
        if char == separator and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    return [part.strip() for part in (*parts, current) if part.strip()]


def _arguments(text: str, symbol: str) -> list[tuple[int, int, str]]:
    _, _, metadata = text.partition("amdhsa.kernels:\n")
    for block in re.split(r"^  - ", metadata, flags=re.M)[1:]:
        if re.search(rf"\.name:\s+{re.escape(symbol)}$", block, re.M):
            found = re.findall(
                r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", block
            )
            return [(int(offset), int(size), kind) for offset, size, kind in found]
    raise ValueError(f"metadata: expected an entry for {symbol}, got none")
