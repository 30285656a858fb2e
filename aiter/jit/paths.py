"""Where are the C++ sources and the compiler config, and how is a cache folder created?

A wheel carries both in `aiter/_src`; a checkout and an editable install have them beside the
package. The first that exists wins, so an installed package never depends on a checkout.
"""

from __future__ import annotations

from pathlib import Path

from aiter.jit import envs

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


def make_private_folder(root: Path, name: str | Path = "") -> Path:
    """Creates `root` and the folder `name` in it, for the owner alone where they are new.

    Others could otherwise leave a shared object there that this process then loads. With
    AITER_SHARED_CACHE new folders are for the group of the folder above, too.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = root
    for part in ("", *Path(name).parts):
        folder = folder / part
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        if envs.AITER_SHARED_CACHE.get():
            folder.chmod(0o2770)
    return folder
