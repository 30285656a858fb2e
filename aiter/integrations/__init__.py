"""Other people's models on these ops, one module per library; none is imported by `import aiter`."""

from .. import _installed

_installed.require()
