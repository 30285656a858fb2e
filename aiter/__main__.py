"""`python -m aiter`: see `aiter.cli`."""

import sys

from aiter.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
