"""What can be done from the command line?

One function per command, each returning an exit status: 0 done, 1 a failure that was reported, 2 a
wrong command line (as argparse has it). An expected failure is one message on stderr, no traceback.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..jit.errors import JitError
from ..jit.target import KINDS
from . import cache_commands, env_command

_EPILOG = "Environment variables: see `python -m aiter env`."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] in (["demo"], ["explain"], ["selftest"], ["tune"]):
            # NOTE: they have their own options and import the ops; nothing else should pay for it.
            return int(importlib.import_module(f"aiter.cli.{arguments[0]}").main(arguments[1:]))
        options = _parser().parse_args(arguments)
        return int(options.run(options))
    except JitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m aiter", description=__doc__, epilog=_EPILOG)
    parser.description = "Builds and inspects the just-in-time compiled modules."
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    env = commands.add_parser("env", help="show versions, compilers, devices and variables")
    env.set_defaults(run=env_command.run)

    listing = commands.add_parser("list", help="list the modules of the compiler config")
    listing.set_defaults(run=cache_commands.run_list)

    build = commands.add_parser("build", help="build modules ahead of use")
    build.add_argument("modules", nargs="*", metavar="MODULE", help="which modules to build")
    build.add_argument("--all", action="store_true", help="build every module of the config")
    build.add_argument("--target", choices=KINDS, default="cpu", help="kind of target (cpu)")
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

    status = commands.add_parser("status", help="show what is cached, and whether it is valid")
    status.set_defaults(run=cache_commands.run_status)

    clean = commands.add_parser("clean", help="remove stale and damaged builds, and logs")
    clean.add_argument("--all", action="store_true", help="remove every build")
    clean.set_defaults(run=cache_commands.run_clean)

    # NOTE: these are dispatched before the parser runs; here they only show up in the help.
    commands.add_parser("explain", help="say which path a shape takes, and why (explain --help)")
    commands.add_parser("tune", help="measure which path is the fastest here (tune --help)")
    commands.add_parser("selftest", help="check every op on this machine (selftest --help)")
    commands.add_parser("demo", help="show the fused routing at work (demo --help)")
    return parser
