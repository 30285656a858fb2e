"""How does a module get into the process?

`Loader` ties the parts together: plan, look up, build on a miss, verify, load by absolute path. One
lock per module and target makes threads that call at the same time build and load once. The shared
object is loaded straight from the cache with importlib's extension loader and is not entered in
`sys.modules`: one process may hold the same module for several targets.

What was built into the package ahead of time (`prebuilt`) comes first, and needs no compiler.

On a hit nothing is locked across processes and no process is started; `build` and what it imports
stay unimported.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import threading
from functools import cache
from pathlib import Path
from types import ModuleType

from . import envs, paths
from .cache import COMPILER_DIR, Cache, Entry
from .errors import CacheError, LoadError
from .log import get_logger
from .plan import Plan, make_plan
from .prebuilt import find_prebuilt
from .spec import module_names
from .target import Target

_LOAD_ATTEMPTS = 3


class Loader:
    """Loads modules of one compiler config from one cache folder.

    Args:
        config_path: the compiler config; None for the package's own.
        csrc_dir: what AITER_CSRC_DIR stands for; None for the package's own.
        cache_dir: the cache folder; None for the one that the environment says.
        prebuilt_dir: a folder of builds that come first; None for none.
    """

    def __init__(
        self,
        config_path: Path | None = None,
        csrc_dir: Path | None = None,
        cache_dir: Path | None = None,
        prebuilt_dir: Path | None = None,
    ) -> None:
        self.config_path = config_path or paths.config_path()
        self.csrc_dir = csrc_dir or paths.csrc_dir()
        self.cache = Cache(cache_dir or envs.cache_dir())
        self.prebuilt_dir = prebuilt_dir
        self._modules: dict[tuple[str, Target], ModuleType] = {}
        self._rebuilt: set[tuple[str, Target]] = set()
        self._locks: dict[tuple[str, Target], threading.Lock] = {}
        self._guard = threading.Lock()

    def modules(self) -> list[str]:
        """The names in the config, in its order; raises ConfigError."""
        return module_names(self.config_path, self.csrc_dir)

    def plan(self, module: str, target: Target) -> Plan:
        """What the compiler would see now for `module` and `target`."""
        memo_dir = self.cache.root / COMPILER_DIR
        return make_plan(self.config_path, self.csrc_dir, memo_dir, module, target)

    def ensure(self, module: str, target: Target, force: bool = False) -> tuple[Entry, bool]:
        """The build of `module` for `target`, made if missing, and whether it was made now.

        Args:
            force: build even if the cache has it.

        Raises:
            CacheError: it is missing and AITER_NO_BUILD forbids building, or the cache folder
                cannot be written or has a path that is not UTF-8.
            BuildError: the build failed.
            ConfigError, TargetError, ToolchainError: as their names say.
        """
        if self.prebuilt_dir is not None and not force:
            entry = find_prebuilt(
                self.prebuilt_dir, self.config_path, self.csrc_dir, module, target
            )
            if entry is not None:
                return entry, False
        problem = paths.why_not_loadable(self.cache.root)
        if problem is not None:
            raise CacheError(f"cache folder: {problem}; set AITER_JIT_DIR to a folder elsewhere")
        plan = self.plan(module, target)
        if force:
            reason = "AITER_REBUILD" if envs.AITER_REBUILD.get() else "asked to"
        else:
            found = self.cache.lookup(plan)
            if isinstance(found, Entry):
                return found, False
            reason = found.reason
        if envs.AITER_NO_BUILD.get():
            raise CacheError(
                f"module {module} for {target.label}: expected a build in {self.cache.root}, since"
                f" AITER_NO_BUILD forbids building, got none ({reason}); build it ahead with"
                f" `{ahead_command(module, target)}`"
            )
        from .build import build

        return build(lambda: self.plan(module, target), self.cache, reason, force), True

    def load(self, module: str, target: Target) -> ModuleType:
        """The loaded `module` for `target`, built first if need be; raises as `ensure` does.

        Raises:
            LoadError: the shared object cannot be loaded.
        """
        return self.load_now(module, target)[0]

    def load_now(self, module: str, target: Target) -> tuple[ModuleType, bool]:
        """As `load`, and whether the module was built by this very call."""
        key = (module, target)
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key in self._modules:
                return self._modules[key], False
            self._modules[key], built = self._load(key)
            return self._modules[key], built

    def _load(self, key: tuple[str, Target]) -> tuple[ModuleType, bool]:
        module, target = key
        for _ in range(_LOAD_ATTEMPTS):
            force = envs.AITER_REBUILD.get() and key not in self._rebuilt
            entry, built = self.ensure(module, target, force)
            if built:
                self._rebuilt.add(key)
            _check_runtime(module, target)
            try:
                return load_extension(module, entry.library), built
            except ImportError as error:
                if self.prebuilt_dir in entry.folder.parents:
                    get_logger().warning(
                        "prebuilt %s does not load here (%s); going on without prebuilt modules",
                        entry.library,
                        error,
                    )
                    self.prebuilt_dir = None
                elif entry.library.is_file():
                    raise LoadError(
                        f"module {module} for {target.label}: expected to load {entry.library},"
                        f" got {error}"
                    ) from error
        # NOTE: another process that rebuilds may take a build away between lookup and load.
        raise LoadError(
            f"module {module} for {target.label}: expected a build that stays in place, got one"
            f" that other processes removed {_LOAD_ATTEMPTS} times"
        )


@cache
def default_loader() -> Loader:
    """The loader of the package's own modules; the environment is read at the first call."""
    return Loader(prebuilt_dir=paths.PREBUILT_DIR)


def _check_runtime(module: str, target: Target) -> None:
    """Raises LoadError where a sanitizer's runtime is missing: loading would end the process."""
    if target.cpu_check != "address":
        return
    import ctypes

    if not hasattr(ctypes.CDLL(None), "__asan_init"):
        raise LoadError(
            f"module {module} for {target.label}: expected the address sanitizer's runtime in this"
            " process, got none; start Python with LD_PRELOAD=$(g++ -print-file-name=libasan.so)"
            " and ASAN_OPTIONS=detect_leaks=0, as op_tests/fire/check_kernels.py does"
        )


def load_extension(name: str, path: Path) -> ModuleType:
    """Loads the extension module `name` from the absolute `path`; raises ImportError."""
    # NOTE: pybind11 keeps one module per full name in a process, so the second target's build would
    # come back as the first's. Python asks the file only for the last part of a dotted name.
    unique = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    name = f"{unique}.{name}"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:
        raise ImportError(f"no import spec for {path}")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def ahead_command(module: str, target: Target) -> str:
    """The command that builds `module` for `target` ahead of use."""
    archs = ";".join(target.archs)
    return f"python -m aiter build {module} --target {target.kind} --arch '{archs}'"
