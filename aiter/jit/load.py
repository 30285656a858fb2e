"""How does a module get into the process?

`Loader` ties the parts together: plan, look up, build on a miss, verify, load. One lock per module
and target makes threads that call at the same time build and load once. The shared object is loaded
with importlib's extension loader and is not entered in `sys.modules`: one process may hold the same
module for several targets.

Loaded is the open file whose owner was checked and whose bytes were hashed, by its descriptor in
/proc; its name is not looked up again, so it does not matter what is put there meanwhile. The
descriptor stays open as long as the process: addr2line, sanitizers and debuggers find the file by
it. A build has nothing beside its shared object that it could look for at a path relative to its
own. Rejected: a private copy in memory (memfd), which is refused where vm.memfd_noexec is 2, costs
each process the memory of the whole file, and has no name in /proc/self/maps that profilers could
open.

A forked child starts with locks of its own, as nobody would release those that other threads held,
and looks up each module anew.

What was built into the package ahead of time (`prebuilt`) comes first, and needs no compiler.

On a hit nothing is locked across processes and no process is started; `build` and what it imports
stay unimported.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import itertools
import os
import threading
import weakref
from functools import cache
from pathlib import Path
from types import ModuleType

from . import envs, paths
from .cache import COMPILER_DIR, Cache
from .errors import CacheError, LoadError
from .log import get_logger
from .manifest import Entry
from .plan import Plan, make_plan
from .prebuilt import find_prebuilt
from .spec import module_names
from .target import Target
from .trust import File

_LOAD_ATTEMPTS = 8

_loads = itertools.count()
_loaded: dict[tuple[str, str], tuple[ModuleType, File]] = {}  # by path and content
_loaders: weakref.WeakSet[Loader] = weakref.WeakSet()


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
        self._rebuilt: set[tuple[str, Target]] = set()
        self.forget_modules()
        _loaders.add(self)

    def forget_modules(self) -> None:
        """Starts anew with modules and locks, as a forked child has to."""
        self._modules: dict[tuple[str, Target], ModuleType] = {}
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
                cannot be written.
            BuildError: the build failed.
            ConfigError, TargetError, ToolchainError: as their names say.
        """
        if self.prebuilt_dir is not None and not force:
            entry = find_prebuilt(
                self.prebuilt_dir, self.config_path, self.csrc_dir, module, target
            )
            if entry is not None:
                return entry, False
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
            opened = entry if entry.file is not None else self.cache.opened(entry)
            if opened is None:
                continue
            try:
                return load_extension(module, opened), built
            except ImportError as error:
                if self.prebuilt_dir not in entry.folder.parents:
                    raise LoadError(
                        f"module {module} for {target.label}: expected to load {entry.library},"
                        f" got {error}"
                    ) from error
                get_logger().warning(
                    "prebuilt %s does not load here (%s); going on without prebuilt modules",
                    entry.library,
                    error,
                )
                self.prebuilt_dir = None
        # NOTE: another process that rebuilds may take away a build that was just published.
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


def load_extension(name: str, entry: Entry) -> ModuleType:
    """Loads the extension module `name` from the open file of `entry`; raises ImportError."""
    file = entry.file
    if file is None:
        raise ImportError(
            f"expected {entry.library} to be open, got a build that was not looked at"
        )
    key = (str(entry.library), str(entry.manifest["library"]["sha256"]))
    if key in _loaded:
        return _loaded[key][0]
    # NOTE: pybind11 keeps one module per full name in a process, so the second target's build would
    # come back as the first's. Python asks the file only for the last part of a dotted name.
    unique = hashlib.sha256(os.fsencode(entry.library)).hexdigest()[:16]
    name = f"{unique}.{name}"
    path = _path_of_open(file)
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.machinery.ModuleSpec(name, loader, origin=path)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    spec.origin = module.__file__ = str(entry.library)
    _loaded.setdefault(key, (module, file))
    return module


def _path_of_open(file: File) -> str:
    """A path of an open file that no load in this process has used before.

    glibc takes a library for loaded by its path alone, and descriptors are used again. The kernel
    reads over what is added here. The process has its number instead of `self`, since tools that
    are asked about an address open the path from theirs.
    """
    try:
        process = os.readlink("/proc/self")
    except OSError as error:
        raise ImportError(
            f"expected /proc to be mounted, as modules are loaded by what is open, got"
            f" {error.strerror}"
        ) from None
    unique = f"{next(_loads):b}".replace("0", "/").replace("1", "./")
    return f"/proc/{process}/fd/{unique}{file.fd}"


def _forget_after_fork() -> None:
    for loader in list(_loaders):
        loader.forget_modules()


os.register_at_fork(after_in_child=_forget_after_fork)


def ahead_command(module: str, target: Target) -> str:
    """The command that builds `module` for `target` ahead of use."""
    archs = ";".join(target.archs)
    return f"python -m {paths.PACKAGE} build {module} --target {target.kind} --arch '{archs}'"
