"""What is the package called, and where are the C++ sources and the compiler config?

A wheel carries both in `_src` in the package; a checkout and an editable install have them beside
the package. The first that exists wins, so an installed package never depends on a checkout.

The name is that under which the package was imported, as the same tree may be there under two. Log,
command line and cache folder go by it.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = __name__.partition(".")[0]
PACKAGE_DIR = Path(__file__).resolve().parent.parent
PREBUILT_DIR = PACKAGE_DIR / "_prebuilt"  # there only where modules were built ahead


def source_root() -> Path:
    """The folder that holds `csrc` and `jit_config`."""
    bundled = PACKAGE_DIR / "_src"
    return bundled if bundled.is_dir() else PACKAGE_DIR.parent


def csrc_dir() -> Path:
    """The folder of the C++ sources."""
    return source_root() / "csrc"


def config_path() -> Path:
    """The compiler config file."""
    return source_root() / "jit_config" / "optCompilerConfig.json"
