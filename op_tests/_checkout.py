"""Which aiter do the op tests test? Importing this module puts their own checkout first."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]

if (_ROOT / "aiter").is_dir() and str(_ROOT) not in sys.path:
    sys.path.insert(0, str(_ROOT))
