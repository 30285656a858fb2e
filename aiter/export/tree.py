"""How is an export written, removed, checked and compared?

Nothing is written before all is known to fit: the layout, the names, the anchors of every edit. Then
the note (see note.py), new files, edits, and the note again. Every file is written as a whole. Removing
goes the other way round, edits first and the note last, so that each of the two can be interrupted at
any point and removed from there.

A file that somebody changed since is theirs: it is named, and neither removed nor written over unless
`force` says so.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .._version import __version__
from . import edits as edits_of
from .errors import ExportError
from .layout import Layout, find_layout, read_text
from .note import (
    PART,
    EditNote,
    Note,
    hash_of,
    hash_of_file,
    note_path,
    read_note,
    write_file,
    write_note,
)
from .payload import check_names, make_payload

_MARKS = ("fused_topk_moe_sorting", "fused_moe_from_logits", "given_prepared")
_FORCE = "--force takes them as they are"


@dataclass(frozen=True)
class Wanted:
    """A tree as an export leaves it: new files, and edited files before and after."""

    files: dict[str, str]
    before: dict[str, str]
    after: dict[str, str]
    inserted: dict[str, list[str]]


def export(folder: Path, force: bool = False) -> list[str]:
    """Writes the op into the tree in `folder`, or what is new of it; returns what was done.

    Raises:
        ExportError: the tree, or something in it, is not as expected; nothing was written.
        ToolchainError: black or clang-format is missing; likewise.
    """
    layout = find_layout(folder)
    note = read_note(layout)
    wanted = _wanted(layout, note, force)
    done = []
    if note is not None:
        if note.complete and _is_there(layout, note, wanted):
            return [f"nothing to change in {layout.root} ({layout.name})"]
        _refuse_changed(layout, note, force)
        _remove(layout, note)
        done.append("removed what an earlier export wrote")
    _write(layout, wanted)
    done += [f"wrote {name} ({count} files)" for name, count in _by_folder(wanted)]
    done += [f"edited {path}" for path in wanted.after]
    done.append(f"exported into {layout.root} ({layout.name}); {note_path(layout)} says what")
    return done


def remove(folder: Path, force: bool = False) -> list[str]:
    """Takes an export out of the tree again, with what was built of it; returns what was done.

    Raises:
        ExportError: there is none, or files were changed since; nothing was removed.
    """
    layout = find_layout(folder)
    note = read_note(layout)
    if note is None:
        place = (layout.root / note_path(layout)).parent
        if _is_leftover(place):
            shutil.rmtree(place)
            return [f"removed what an interrupted export left in {layout.root}"]
        raise ExportError(
            f"--remove: expected a tree with an export, got {layout.root} without"
            f" {note_path(layout)}"
        )
    _refuse_changed(layout, note, force)
    built = _remove(layout, note)
    done = [f"took our lines out of {path}" for path in note.edits]
    done += [f"removed {path}" for path in built]
    done.append(f"removed {len(note.files)} files from {layout.root}")
    return done


def check(folder: Path) -> tuple[list[str], list[str]]:
    """What is wrong with the tree's export, and what is worth to be said of it."""
    layout = find_layout(folder)
    note = read_note(layout)
    if note is None:
        return [f"nothing was exported into {layout.root}"], []
    problems = [] if note.complete else ["the export was interrupted"]
    remarks = []
    for path, expected in note.files.items():
        found = hash_of_file(layout.root / path)
        if found != expected:
            problems.append(f"{path} {'is missing' if found is None else 'was changed'}")
    for path, edit in note.edits.items():
        if hash_of_file(layout.root / path) == edit.after:
            continue
        try:
            edits_of.take_out(path, read_text(layout.root / path), edit.inserted)
        except (ExportError, OSError) as error:
            problems.append(str(error))
        else:
            remarks.append(f"{path} was changed, our lines in it were not")
    count = len(note.files) + len(note.edits)
    remarks.append(f"{count} files of version {note.version} in {layout.root} ({note.layout})")
    return problems, remarks


def diff(folder: Path, force: bool = False) -> str:
    """What `export` would change, as a patch (`patch -p1`, `git apply`); "" for nothing.

    Raises:
        As `export`.
    """
    layout = find_layout(folder)
    note = read_note(layout)
    wanted = _wanted(layout, note, force)
    new = {**wanted.files, **wanted.after}
    gone = [path for path in (note.files if note else ()) if path not in new]
    parts = []
    for path in (*new, *gone):
        place = layout.root / path
        old = read_text(place) if place.exists() else None
        parts.append(_patch(path, old, new.get(path)))
    return "".join(parts)


def _wanted(layout: Layout, note: Note | None, force: bool) -> Wanted:
    payload = make_payload(layout)
    if note is None:
        check_names(layout, payload)
    before, after, inserted = {}, {}, {}
    for path, edits in payload.edits.items():
        text = read_text(layout.root / path)
        if note is not None and path in note.edits:
            text = _without(path, text, note.edits[path], force)
        before[path] = text
        after[path] = edits_of.insert(path, text, edits)
        inserted[path] = [edit.text for edit in edits]
    return Wanted(payload.files, before, after, inserted)


def _without(path: str, text: str, edit: EditNote, force: bool) -> str:
    """An edited file's text without our lines."""
    found = hash_of(text)
    if found == edit.before:
        return text
    if found == edit.after:
        return edits_of.take_out(path, text, edit.inserted)
    if not force:
        raise ExportError(f"{path}: expected it as it was exported, got it changed; {_FORCE}")
    for lines in edit.inserted:
        if lines in text:
            text = edits_of.take_out(path, text, [lines])
    mark = next((mark for mark in _MARKS if mark in text), None)
    if mark is not None:
        raise ExportError(
            f"{path}: expected nothing of the export beside the lines that it wrote, got {mark!r};"
            " take it out by hand"
        )
    return text


def _is_there(layout: Layout, note: Note, wanted: Wanted) -> bool:
    """Whether the tree is what it is to be."""
    files = {path: hash_of(text) for path, text in wanted.files.items()}
    files |= {path: hash_of(text) for path, text in wanted.after.items()}
    return {*files} == {*note.files, *note.edits} and all(
        hash_of_file(layout.root / path) == expected for path, expected in files.items()
    )


def _refuse_changed(layout: Layout, note: Note, force: bool) -> None:
    changed = []
    for path, expected in note.files.items():
        if hash_of_file(layout.root / path) not in (None, expected):
            changed.append(path)
    for path, edit in note.edits.items():
        if hash_of_file(layout.root / path) not in (edit.before, edit.after):
            changed.append(path)
    if changed and not force:
        raise ExportError(
            f"expected what was exported as it was written, got {', '.join(changed)} changed since;"
            f" {_FORCE}"
        )


def _write(layout: Layout, wanted: Wanted) -> None:
    edits = {
        path: EditNote(hash_of(wanted.before[path]), hash_of(after), wanted.inserted[path])
        for path, after in wanted.after.items()
    }
    note = Note(
        version=__version__,
        layout=layout.name,
        complete=False,
        files={path: hash_of(text) for path, text in wanted.files.items()},
        edits=edits,
        folders=list(_new_folders(layout, (*wanted.files, note_path(layout)))),
    )
    write_note(layout, note)
    for path, text in (wanted.files | wanted.after).items():
        write_file(layout.root / path, text.encode())
    write_note(layout, replace(note, complete=True))


def _remove(layout: Layout, note: Note) -> list[str]:
    """Removes all that a note names, as it is; returns what was removed of builds."""
    texts = {
        path: _without(path, read_text(layout.root / path), edit, force=True)
        for path, edit in note.edits.items()
        if (layout.root / path).exists()
    }
    for path, text in texts.items():
        place = layout.root / path
        if read_text(place) != text:
            write_file(place, text.encode())
        _unlink_part(place)
    for path in note.files:
        place = layout.root / path
        place.unlink(missing_ok=True)
        _unlink_part(place)
    built = []
    for place in _built(layout, note):
        built.append(place.relative_to(layout.root).as_posix())
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    _remove_empty(layout, note)
    last = layout.root / note_path(layout)
    _unlink_part(last)
    last.unlink()
    _remove_empty(layout, note)
    return built


def _remove_empty(layout: Layout, note: Note) -> None:
    """Removes folders that the export made, as far as nothing is in them."""
    for folder in reversed(note.folders):
        try:
            (layout.root / folder).rmdir()
        except OSError:
            continue


def _unlink_part(path: Path) -> None:
    path.with_name(path.name + PART).unlink(missing_ok=True)


def _built(layout: Layout, note: Note) -> Iterator[Path]:
    """What Python and the tree's JIT made of our files: it would be taken for what is written next."""
    jit = layout.root / "aiter" / "jit"
    module = edits_of.MODULE
    for place in (jit / f"{module}.so", jit / "build" / module, jit / "build" / f"lock_{module}"):
        if place.exists():
            yield place
    for path in note.files:
        place = layout.root / path
        if place.suffix == ".py":
            yield from sorted(place.parent.glob(f"__pycache__/{place.stem}.*.pyc"))


def _is_leftover(folder: Path) -> bool:
    """Whether an export ended before its note was there."""
    return folder.is_dir() and all(path.name.endswith(PART) for path in folder.iterdir())


def _new_folders(layout: Layout, paths: tuple[str, ...]) -> Iterator[str]:
    """The folders of these paths that are not there, outermost first."""
    seen = set()
    for path in paths:
        for parent in reversed(Path(path).parents):
            name = parent.as_posix()
            if name not in seen and not (layout.root / parent).is_dir():
                seen.add(name)
                yield name


def _by_folder(wanted: Wanted) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for path in wanted.files:
        parent = Path(path).parent.as_posix()
        counts[parent] = counts.get(parent, 0) + 1
    return sorted(counts.items())


def _patch(path: str, old: str | None, new: str | None) -> str:
    if old == new:
        return ""
    lines = difflib.unified_diff(
        [] if old is None else old.splitlines(keepends=True),
        [] if new is None else new.splitlines(keepends=True),
        "/dev/null" if old is None else f"a/{path}",
        "/dev/null" if new is None else f"b/{path}",
    )
    ended = (
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )
    head = f"diff --git a/{path} b/{path}\n"
    if old is None:
        head += "new file mode 100644\n"
    elif new is None:
        head += "deleted file mode 100644\n"
    return head + "".join(ended)
