"""Which failures can a caller of the loader tell apart?

Every failure that the loader expects is a `JitError`; its text is a sentence with the values that
matter. Anything else that escapes is a defect of the loader. One class per part, not one per cause:
nobody handles "unknown key" and "missing source" differently, and the text tells them apart.
"""

from __future__ import annotations

from pathlib import Path


class JitError(RuntimeError):
    """Base of every error that the loader raises on purpose."""


class EnvError(JitError):
    """An environment variable has a value that its table entry does not allow."""


class ConfigError(JitError):
    """The compiler config, or one module's entry in it, is wrong."""


class TargetError(JitError):
    """A device or an architecture name for which no target exists."""


class ToolchainError(JitError):
    """A compiler, or a header that every build needs, is missing."""


class CacheError(JitError):
    """The cache folder cannot be used as needed."""


class LoadError(JitError):
    """A built module cannot be loaded into this process, or lacks what is asked of it."""


class BuildError(JitError):
    """A build failed. The attributes hold what the message says.

    Attributes:
        module: the module's name in the config.
        target: the target's label, such as `cpu-wave64-x86-64-v3`.
        command: the command that failed; empty if no single command did.
        first_error: the compiler's first error line or lines.
        log_path: the file with every command and its full output; None if none could be kept.
    """

    def __init__(
        self,
        module: str,
        target: str,
        problem: str,
        command: str = "",
        first_error: str = "",
        log_path: Path | None = None,
    ) -> None:
        self.module = module
        self.target = target
        self.problem = problem
        self.command = command
        self.first_error = first_error
        self.log_path = log_path
        lines = [f"building {module} for {target} failed: {problem}"]
        if first_error:
            lines.append(f"  first error: {first_error}")
        if command:
            lines.append(f"  command: {command}")
        if log_path is not None:
            lines.append(f"  log: {log_path}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return (
            type(self),
            (
                self.module,
                self.target,
                self.problem,
                self.command,
                self.first_error,
                self.log_path,
            ),
        )
