"""`python -m aiter`: see `aiter.cli`."""

import sys

from . import _installed

if __name__ == "__main__":
    try:
        _installed.require()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from .cli.main import main

    sys.exit(main())
