"""Why was nothing written, or nothing removed?"""

from __future__ import annotations


class ExportError(ValueError):
    """A tree that is not what the export goes by; its text says what was expected, and what is there."""
