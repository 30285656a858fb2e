"""What can be done from the command line?

One function per command, each returning an exit status: 0 done, 1 a failure that was reported, 2 a
wrong command line (as argparse has it, and as the ops say of arguments that they refuse). An expected
failure is one message on stderr, no traceback. So is a defect, whose message says so; where it came
from is shown with AITER_LOG_LEVEL=DEBUG.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence

from .._version import __version__
from ..jit import envs
from ..jit.errors import JitError
from ..jit.paths import PACKAGE
from ..jit.target import KINDS
from . import cache_commands, env_command, export
from .options import PROGRAM, Parser

_NO_MEMORY = re.compile("out of memory|allocate memory")  # as PyTorch says it, of GPU and CPU
_EPILOG = f"Environment variables: see `{PROGRAM} env`."
# NOTE: they have parsers of their own and import the ops; nothing else should pay for it.
OWN_PARSERS = {
    "explain": "say which path a shape takes, and why",
    "tune": "measure which path is the fastest here",
    "selftest": "check every op on this machine",
    "demo": "show the fused routing at work",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _print_anything()
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # NOTE: whoever read our output has enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except JitError as error:
        return _report(str(error), 1)
    except ValueError as error:
        return _report(str(error), 2, error)
    except OSError as error:
        return _report(f"expected to read and write files, got {error}", 1, error)
    except Exception as error:
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            return _report(f"expected a problem that fits the memory, got {error}", 1, error)
        text = f"this is a defect of {PACKAGE}: {type(error).__name__}: {error}"
        return _report(f"{text} (AITER_LOG_LEVEL=DEBUG shows where)", 1, error)


def _report(text: str, status: int, error: Exception | None = None) -> int:
    """Prints a message; raises `error` again for who asked for everything."""
    if error is not None and (envs.AITER_LOG_LEVEL.text() or "").upper() == "DEBUG":
        raise error
    print(f"error: {text}", file=sys.stderr)
    return status


def _print_anything() -> None:
    """Lets stdout print what is not text in its encoding, and closed outputs take everything."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # NOTE: as Python has it where the shell says `>&-`.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _run(arguments: list[str]) -> int:
    parser = make_parser()
    verb = arguments[0] if arguments else ""
    known = (*verbs(parser),)
    if verb and not verb.startswith("-") and verb not in known:
        near = difflib.get_close_matches(verb, known, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"invalid choice: {verb!r}{meant} (choose from {', '.join(known)})")
    if verb in OWN_PARSERS:
        module = importlib.import_module(f"{__package__}.{verb}")
        return int(module.main(arguments[1:]))
    options = parser.parse_args(arguments)
    return int(options.run(options))


def verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(action.choices)
    return found


def make_parser() -> argparse.ArgumentParser:
    """The parser of everything but the commands in `OWN_PARSERS`."""
    parser = Parser(PROGRAM, epilog=_EPILOG)
    parser.description = "Builds and inspects the just-in-time compiled modules."
    parser.add_argument("--version", action="version", version=f"{PACKAGE} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    env = commands.add_parser("env", help="show versions, compilers, devices and variables")
    env.add_argument("--json", action="store_true", help="as JSON, for other programs")
    env.set_defaults(run=env_command.run)

    listing = commands.add_parser("list", help="list the modules of the compiler config")
    listing.set_defaults(run=cache_commands.run_list)

    _add_build(commands.add_parser("build", help="build modules ahead of use"))

    status = commands.add_parser("status", help="show what is cached, and whether it is valid")
    status.set_defaults(run=cache_commands.run_status)

    clean = commands.add_parser("clean", help="remove stale and damaged builds, and logs")
    clean.add_argument("--all", action="store_true", help="remove every build")
    clean.add_argument("--dry-run", action="store_true", help="list what would go, remove nothing")
    clean.set_defaults(run=cache_commands.run_clean)

    export.add_options(commands.add_parser("export", help="write the op into ROCm's aiter"))

    for verb, purpose in OWN_PARSERS.items():
        commands.add_parser(verb, help=f"{purpose} ({verb} --help)")
    return parser


def _add_build(build: argparse.ArgumentParser) -> None:
    build.add_argument("modules", nargs="*", metavar="MODULE", help="which modules to build")
    build.add_argument("--all", action="store_true", help="build every module of the config")
    build.add_argument("--target", choices=KINDS, default="cpu", help="kind of target")
    build.add_argument(
        "--arch",
        default="",
        help="architectures, such as 'gfx942;gfx90a', sm_90 or wave32; the machine's own if unset",
    )
    build.add_argument("--force", action="store_true", help="build even what is cached")
    build.add_argument(
        "--package",
        action="store_true",
        help="build into the package, where modules are found first, each architecture by itself",
    )
    build.add_argument(
        "--device-only",
        action="store_true",
        help="with --target rocm: compile the device code alone and print what it costs",
    )
    build.add_argument(
        "--compile-commands",
        nargs="?",
        const="compile_commands.json",
        metavar="FILE",
        help="build nothing; write the commands for editors to FILE (compile_commands.json)",
    )
    build.add_argument("--mix", action="store_true", help="with --device-only: the instruction mix")
    build.set_defaults(run=cache_commands.run_build)
