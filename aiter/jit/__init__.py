"""The just-in-time loader: from a name in `jit_config/optCompilerConfig.json` to a loaded module.

One module per question:

- `envs`       which environment variables exist, and what do they say?
- `spec`       what does the compiler config say about a module?
- `target`     which kind of device, and which architectures, is code built for?
- `compilers`  which compiler is there, and which version is it?
- `toolchain`  which flags does a target need?
- `rocm_flags` which of them does a version of hipcc know?
- `plan`       what exactly will the compiler see? (this is the cache key)
- `cache`      do we have it already?
- `manifest`   what does a build say of itself?
- `prebuilt`   is it in the package already?
- `build`      how does it become a shared object?
- `builders`   where does a builder work, and what does it leave to others?
- `driver`     how are compiler processes run?
- `progress`   what does a person see meanwhile?
- `log`        where do messages go?
- `folders`    how does a folder or file of the cache come to be?
- `trust`      who could have put that into the cache folder?
- `cleanup`    what in the cache folder is ours to remove?
- `full_disk`  is it that the disk is full?
- `load`       how does it get into the process?
- `core`       how does a Python function call into it?
- `warmup`     what has to be there before a server takes requests?
- `errors`     which failures can a caller tell apart?
- `paths`      what is the package called, and where are its sources?

`device_code` and `device_kernels` answer another one: what machine code does an AMD target get?

Nothing is imported before it is needed: importing this package loads `core`, `target`, `envs`,
`paths` and the errors; the first call on a device loads the rest up to `load`; only a miss loads
`build`, filelock and, where templates call for it, jinja2. `aiter.jit.load.Loader` loads other
configs.
"""

from .core import compile_ops, module_for
from .errors import (
    BuildError,
    CacheError,
    ConfigError,
    EnvError,
    JitError,
    LoadError,
    TargetError,
    ToolchainError,
)
from .target import cpu_wave

__all__ = [
    "BuildError",
    "CacheError",
    "ConfigError",
    "EnvError",
    "JitError",
    "LoadError",
    "TargetError",
    "ToolchainError",
    "compile_ops",
    "cpu_wave",
    "module_for",
]
