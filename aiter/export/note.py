"""What was written into a tree, so that it can be checked and taken away again?

A JSON file in our folder of headers there. It is written before anything else, with `complete` false,
and once more when all is done; what an interrupted export had got to follows from the hashes. A hash
is the SHA-256 of a file's bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import ExportError
from .layout import Layout
from .sources import FOLDER

NAME = "export.json"
PART = ".part"  # behind the name of a file that is being written


@dataclass(frozen=True)
class EditNote:
    """An edited file: its hash before and after, and the lines that were put in."""

    before: str
    after: str
    inserted: list[str]


@dataclass(frozen=True)
class Note:
    """An export.

    Attributes:
        version: of this package.
        layout: of the tree, `Layout.name`.
        complete: whether the export came to its end.
        files: the hash of every new file, by its path below the root.
        edits: the edited files, by path.
        folders: folders that were not there before, outermost first.
    """

    version: str
    layout: str
    complete: bool
    files: dict[str, str]
    edits: dict[str, EditNote]
    folders: list[str]


def note_path(layout: Layout) -> str:
    """Where the note lies, below the root."""
    return f"{layout.csrc}/include/{FOLDER}/{NAME}"


def read_note(layout: Layout) -> Note | None:
    """The tree's note; None where nothing was exported.

    Raises:
        ExportError: there is one that cannot be understood.
    """
    path = note_path(layout)
    try:
        data = json.loads((layout.root / path).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ExportError(f"{path}: expected the note of an export, got no JSON: {error}") from None
    try:
        edits = {name: EditNote(**edit) for name, edit in data.pop("edits").items()}
        note = Note(edits=edits, **data)
        _check_paths(note)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{path}: expected the note of an export, got {error!r}") from None
    return note


def _check_paths(note: Note) -> None:
    """That a note names nothing outside of the tree: what it names, removing deletes."""
    for path in (*note.files, *note.edits, *note.folders):
        parts = Path(path).parts
        if Path(path).is_absolute() or ".." in parts or not parts:
            raise ValueError(f"the path {path!r}")


def write_note(layout: Layout, note: Note) -> None:
    """Writes the tree's note."""
    text = json.dumps(asdict(note), indent=2) + "\n"
    write_file(layout.root / note_path(layout), text.encode())


def write_file(path: Path, data: bytes) -> None:
    """Writes a file as a whole or not at all; one that is there keeps its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        shutil.copymode(path, part)
    part.replace(path)


def hash_of(data: bytes | str) -> str:
    """The hash of a file with these contents."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def hash_of_file(path: Path) -> str | None:
    """The hash of a file; None where there is none."""
    try:
        return hash_of(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
