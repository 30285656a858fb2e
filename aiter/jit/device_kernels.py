"""What does the compiler's assembly text for an AMD GPU say about its kernels?

One pass over the text that `clang -S` writes gives every kernel's registers, LDS, scratch, spills
and code size (from the metadata and the compiler's remarks) and its static instruction mix (from
the instructions themselves). Occupancy is computed here from the registers and the architecture's
register file, for whole workgroups too; the compiler's own figure is kept beside it as a check.

Rejected: reading the code object with llvm-readelf, as it gives the same numbers without the
instructions and needs one more tool.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .errors import ToolchainError

MIX_CLASSES = (
    "VALU", "DPP", "SALU", "SMEM", "LDS", "VMEM", "branch", "barrier", "waitcnt", "nop", "other",
)  # fmt: skip

_INDEXED = ("v_movrel", "s_movrel", "s_set_gpr_idx")


@dataclass(frozen=True)
class Arch:
    """What a compute unit of one architecture has.

    Attributes:
        wave_size: lanes per wave, as this project compiles for it.
        vgprs: vector registers per lane that the waves of a SIMD share.
        vgpr_granule: they are handed out in multiples of this.
        max_waves: waves per SIMD.
        sgpr_limits: (scalar registers, waves per SIMD) pairs: up to so many registers allow so many
            waves; empty where scalar registers do not limit the waves.
        simds: SIMDs that share the LDS of a workgroup (a compute unit, or a WGP on RDNA).
        lds_bytes: LDS that one workgroup can have.
    """

    wave_size: int
    vgprs: int
    vgpr_granule: int
    max_waves: int
    sgpr_limits: tuple[tuple[int, int], ...]
    simds: int
    lds_bytes: int

    def waves_per_simd(self, vgprs: int, sgprs: int) -> int:
        """Waves that a SIMD can hold at once, each with so many registers."""
        granule = self.vgpr_granule
        allocated = max(granule, (vgprs + granule - 1) // granule * granule)
        waves = min(self.max_waves, self.vgprs // allocated)
        for limit, limited in self.sgpr_limits:
            if sgprs <= limit:
                return min(waves, limited)
        return waves


_GFX9_SGPRS = ((80, 10), (88, 9), (100, 8), (112, 7))
_CDNA = Arch(64, 512, 8, 8, _GFX9_SGPRS, 4, 64 * 1024)
_RDNA = Arch(32, 1536, 24, 16, (), 4, 64 * 1024)

ARCHS: dict[str, Arch] = {
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": Arch(64, 512, 8, 8, _GFX9_SGPRS, 4, 160 * 1024),
    "gfx1100": _RDNA,
    "gfx1201": _RDNA,
    "gfx1250": Arch(32, 1024, 16, 16, (), 4, 320 * 1024),
}


@dataclass(frozen=True)
class KernelCode:
    """The machine code of one kernel, in numbers.

    Attributes:
        symbol: the mangled name.
        name: for people, such as `fused_topk_moe_sorting<WaveRow<f32, 4>>`.
        arch: such as `gfx942`.
        wave_size: lanes per wave.
        vgprs, sgprs: registers that a wave uses.
        vgpr_spills, sgpr_spills: registers that did not fit.
        lds_bytes: LDS known at compile time; dynamic LDS comes on top.
        scratch_bytes: private memory per lane.
        indexed_registers: instructions that pick a register by a variable.
        kernarg_bytes: size of the kernel's argument segment.
        code_bytes: size of the code.
        max_threads: threads of the largest workgroup that it was compiled for.
        waves_per_simd: occupancy that its registers allow.
        compiler_waves_per_simd: the same as the compiler computed it.
        mix: static instructions by class, in the order of MIX_CLASSES.
    """

    symbol: str
    name: str
    arch: str
    wave_size: int
    vgprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    lds_bytes: int
    scratch_bytes: int
    indexed_registers: int
    kernarg_bytes: int
    code_bytes: int
    max_threads: int
    waves_per_simd: int
    compiler_waves_per_simd: int
    mix: dict[str, int]

    @property
    def instructions(self) -> int:
        """Static instructions."""
        return sum(self.mix.values())

    @property
    def workgroups(self) -> int:
        """Workgroups of `max_threads` whose registers fit beside each other; 0 if not even one."""
        waves = self.max_threads // self.wave_size
        return self.waves_per_simd * ARCHS[self.arch].simds // waves


def arch_of(name: str) -> Arch:
    """The entry of ARCHS; raises ToolchainError with what is known."""
    base = name.partition(":")[0]
    if base not in ARCHS:
        raise ToolchainError(
            f"device code for {name}: expected one of {', '.join(ARCHS)}, got {name!r}"
        )
    return ARCHS[base]


def parse_kernels(text: str, arch: str) -> list[KernelCode]:
    """Every kernel of the assembly `text`, in its order.

    Raises:
        ToolchainError: the text has no kernel, or lacks a field that every compiler version writes.
    """
    metadata = _metadata_by_symbol(text)
    if not metadata:
        raise ToolchainError(f"assembly for {arch}: expected at least one kernel, got none")
    return [_kernel(text, arch, symbol, fields) for symbol, fields in metadata.items()]


def kernel_body(text: str, symbol: str) -> str:
    """The lines between a kernel's label and its end, labels and comments included."""
    match = re.search(rf"^{re.escape(symbol)}:.*?\n(.*?)^\.Lfunc_end", text, re.M | re.S)
    if match is None:
        raise ToolchainError(f"assembly: expected a function {symbol}, got none")
    code, _, _ = match[1].partition("\t.section\t.rodata")
    return code


def instruction_lines(body: str) -> list[str]:
    """The instructions of a kernel's body, without labels, directives and comments."""
    found = []
    for line in body.splitlines():
        code = line.partition(";")[0].strip()
        if code and not code.endswith(":") and not code.startswith("."):
            found.append(code)
    return found


def instruction_class(line: str) -> str:
    """Which of MIX_CLASSES an instruction belongs to."""
    mnemonic = line.split(maxsplit=1)[0]
    if mnemonic in ("s_nop", "v_nop"):
        return "nop"
    if mnemonic.startswith(("s_waitcnt", "s_wait_", "s_delay_alu")):
        return "waitcnt"
    if "barrier" in mnemonic:
        return "barrier"
    if mnemonic.startswith(("s_cbranch", "s_branch", "s_endpgm", "s_setpc", "s_swappc")):
        return "branch"
    if mnemonic.startswith(("s_load", "s_buffer_load")):
        return "SMEM"
    if mnemonic.startswith("ds_"):
        return "LDS"
    if mnemonic.startswith(("global_load", "global_store", "global_atomic", "flat_", "buffer_load",
                            "buffer_store", "scratch_")):  # fmt: skip
        return "VMEM"
    if mnemonic.startswith("v_"):
        dpp = re.search(r"_dpp\b|\b(row_|quad_perm|wave_|dpp8)", line) is not None
        return "DPP" if dpp else "VALU"
    if (
        mnemonic.startswith(("s_clause", "s_set_inst_prefetch", "s_sendmsg"))
        or mnemonic[:2] != "s_"
    ):
        return "other"
    return "SALU"


def readable_name(symbol: str) -> str:
    """`topk_softmax<WaveRow<bf16, 4>>` for the mangled name of topk_softmax_kernel of that type.

    Only what this project's kernels use of the Itanium mangling is understood: namespaces, and
    template arguments that are integers or types, templates included. Anything else gives the symbol
    itself.
    """
    if not symbol.startswith("_Z"):
        return symbol
    name, _ = _name(symbol.removeprefix("_Z"))
    return symbol if name is None else name


_BUILTIN_TYPES = {"f": "f32", "d": "f64", "i": "i32", "j": "u32", "l": "i64", "m": "u64"}
_TYPE_NAMES = {"Bf16": "bf16", "F16": "f16"}


def _name(text: str) -> tuple[str | None, str]:
    """The last of a (nested) name's identifiers, `3abc4defg...`, with its template arguments, and
    what follows the name; None if it is not understood."""
    is_nested = text.startswith("N")
    text = text.removeprefix("N").removeprefix("S_")
    name = None
    while match := re.match(r"\d+", text):
        end = match.end() + int(match[0])
        name, text = text[match.end() : end], text[end:]
    if name is None:
        return None, text
    name = _TYPE_NAMES.get(name, name.removesuffix("_kernel"))
    if text.startswith("I"):
        arguments, text = _template_arguments(text[1:])
        name = None if arguments is None else f"{name}<{', '.join(arguments)}>"
    return name, text.removeprefix("E") if is_nested else text


def _template_arguments(text: str) -> tuple[list[str] | None, str]:
    """The arguments up to the E that ends them, and what follows it; None as in `_name`."""
    arguments = []
    while text and text[0] != "E":
        literal = re.match(r"L[a-z](n?\d+)E", text)
        argument: str | None
        if literal is not None:
            argument, text = literal[1].replace("n", "-"), text[literal.end() :]
        elif text[0] in _BUILTIN_TYPES:
            argument, text = _BUILTIN_TYPES[text[0]], text[1:]
        else:
            argument, text = _name(text)
        if argument is None:
            return None, text
        arguments.append(argument)
    return arguments, text.removeprefix("E")


def _metadata_by_symbol(text: str) -> dict[str, dict[str, int]]:
    """The integer fields of every kernel's metadata, by symbol."""
    found = {}
    _, _, metadata = text.partition("amdhsa.kernels:\n")
    for block in re.split(r"^  - ", metadata, flags=re.M)[1:]:
        name = re.search(r"\.name:\s+(\S+)", block)
        if name is not None:
            numbers = re.findall(r"^ {4}\.(\w+):\s+(\d+)$|^\.(\w+):\s+(\d+)$", block, re.M)
            found[name[1]] = {a or c: int(b or d) for a, b, c, d in numbers}
    return found


def _kernel(text: str, arch: str, symbol: str, fields: dict[str, int]) -> KernelCode:
    _, _, remarks = text.partition(f"\t.size\t{symbol}, ")
    code_bytes = _remark(symbol, remarks, r"codeLenInByte = (\d+)")
    occupancy = _remark(symbol, remarks, r"Occupancy: (\d+)")
    code = instruction_lines(kernel_body(text, symbol))
    counts = Counter(map(instruction_class, code))
    try:
        return KernelCode(
            symbol=symbol,
            name=readable_name(symbol),
            arch=arch,
            wave_size=fields["wavefront_size"],
            vgprs=fields["vgpr_count"],
            sgprs=fields["sgpr_count"],
            vgpr_spills=fields["vgpr_spill_count"],
            sgpr_spills=fields["sgpr_spill_count"],
            lds_bytes=fields["group_segment_fixed_size"],
            scratch_bytes=fields["private_segment_fixed_size"],
            indexed_registers=sum(line.startswith(_INDEXED) for line in code),
            kernarg_bytes=fields["kernarg_segment_size"],
            code_bytes=code_bytes,
            max_threads=fields["max_flat_workgroup_size"],
            waves_per_simd=arch_of(arch).waves_per_simd(fields["vgpr_count"], fields["sgpr_count"]),
            compiler_waves_per_simd=occupancy,
            mix={name: counts[name] for name in MIX_CLASSES},
        )
    except KeyError as error:
        raise ToolchainError(
            f"assembly for {arch}, kernel {symbol}: expected the metadata field {error}, got only"
            f" {', '.join(fields)}"
        ) from None


def _remark(symbol: str, remarks: str, pattern: str) -> int:
    match = re.search(rf"^; {pattern}", remarks, re.M)
    if match is None:
        raise ToolchainError(f"assembly, kernel {symbol}: expected a remark {pattern!r}, got none")
    return int(match[1])
