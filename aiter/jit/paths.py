"""Where are the C++ sources and the compiler config, and which folder can hold builds?

A wheel carries both in `aiter/_src`; a checkout and an editable install have them beside the
package. The first that exists wins, so an installed package never depends on a checkout.

Builds are loaded only from folders whose path is UTF-8. From Python 3.12 on, the interpreter keeps its
extension modules by their path in UTF-8 and raises UnicodeEncodeError for any other; older ones would
not mind, but all are to behave alike. Rejected: loading by another name of the same file (a link,
`/proc/self/fd`), as what was checked and what is loaded could then differ.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import envs

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


def why_not_loadable(folder: Path) -> str | None:
    """Why Python loads no module from `folder`, as "expected ..., got ..."; None if it does."""
    path = os.path.abspath(folder)
    shown = path.encode("utf-8", "backslashreplace").decode("utf-8")
    if shown == path:
        return None
    return f"expected a path that is UTF-8, as Python loads modules from no other, got {shown}"


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
