"""A data set's folder: JSONL files, and a manifest that says how to make them again."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minqstar.errors import UserError, first_line, require
from minqstar.files import aside, in_words, owner, replace_folder, sync

MANIFEST = "manifest.json"
OURS = {"world", "vocabulary", "seed"}  # in every manifest of ours


@contextmanager
def folder_of(
    out: Path,
    manifest: dict,
    files: dict[str, Callable[[], Iterable[dict]]],
    say: Callable[[str], None],
    words: dict[str, str],
) -> Iterator[Path]:
    """Inside, the folder `out` holds the files that the manifest describes, and no other process replaces it.

    Where it holds them already it is left as it is. Otherwise they are made aside, rows by rows, and the folder is
    renamed. Another data set of ours is replaced, and `say` says so, since its manifest says how to make it again.
    Whatever else is there is somebody else's: UserError. `words` say of a part of the manifest what its change means.
    """
    path = Path(os.path.abspath(out))
    with owner(path, wait=say):
        there = path.exists() or path.is_symlink()
        odd = _differences(path, manifest, set(files), words) if there else ""
        if odd:
            require(not path.is_symlink(), f"{out} is a link to another data set ({odd}); choose another folder")
            say(f"{out}: made anew ({odd})")
        if odd or not there:
            with in_words(f"cannot write {out}"):
                _make(path, manifest, files)
        yield out


def _differences(path: Path, manifest: dict, files: set[str], words: dict[str, str]) -> str:
    """How the data set in a folder differs from the one of a manifest. UserError if it is no data set of ours."""
    kept, choose = path / MANIFEST, "choose another folder"
    require(kept.is_file(), f"{path} exists and is not a data set of this world; {choose}")
    try:
        old = dict(json.loads(kept.read_bytes()))
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError(f"{kept} is damaged ({first_line(e)}); remove {path}, and it is made anew") from e
    changed = {name: f"{name} {old.get(name)} -> {value}" for name, value in manifest.items()} | words
    odd = [changed[name] for name, value in manifest.items() if old.get(name) != value]
    odd += [f"{name} was missing" for name in sorted(files) if not (path / name).is_file()]
    if odd:
        require(old.keys() >= OURS, f"{path} exists and is not a data set of this world; {choose}")
        more = sorted({file.name for file in path.iterdir()} - files - {MANIFEST})
        require(
            not more, f"{path} holds another data set, which may be replaced, and {more[:1]}, which may not; {choose}"
        )
    return ", ".join(odd)


def _make(path: Path, manifest: dict, files: dict[str, Callable[[], Iterable[dict]]]):
    new = aside(path, "new")
    new.mkdir()
    for name, rows in files.items():
        with open(new / name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows())
    (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for written in (*new.iterdir(), new):
        sync(written)
    replace_folder(new, path)
