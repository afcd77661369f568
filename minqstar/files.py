"""Files written so that nothing is lost: whole or not at all, by one process at a time, and only over what is ours.

A file is written *aside*, under a hidden name of its own, synced, and renamed. A folder is made aside, and what had its
name before is moved aside until the new one stands. An aside's name holds a process id and eight random digits: that
is the mark by which what a killed process left is known as ours. Nothing else is ever removed or moved back.
"""

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minqstar.errors import UserError, require

# What Windows and some mounts answer to a request that they do not know: fsync of a folder, a lock.
UNKNOWN = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
KEPT = (".json", ".jsonl", ".safetensors", ".tiktoken")  # endings of what runs and data sets consist of
LOCKED_BYTE = 2**30  # Windows lets nobody read a locked byte: lock one behind the text


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """Inside, what the system refuses is a UserError: `what` was wanted, and why it was refused."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{what}: {e.strerror or e}") from e


def sync(path: Path):
    """Wait until a file, or the names in a folder, are on the disk, where the system can say so."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs no handle of a reader
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as e:
        if e.errno not in UNKNOWN:
            raise


def aside(path: Path, end: str) -> Path:
    """A name beside `path` that nobody else has: of a `file`, a `new` folder, an `old` one, or one to be `gone`."""
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.{end}"


def asides(folder: Path, name: str, end: str) -> list[Path]:
    """What stands in a folder under such names; `name` and `end` are regular expressions."""
    mark = re.compile(rf"\.{name}\.\d+-[0-9a-f]{{8}}\.{end}")
    return [path for path in folder.iterdir() if mark.fullmatch(path.name) and not path.is_symlink()]


def replace_file(path: Path, write: Callable[[Path], object]):
    """Write a file aside, then give it its name: at every moment the whole old file is there, or the whole new one."""
    new = aside(path, "file")
    try:
        with in_words(f"cannot write {path}"):
            write(new)
            sync(new)
            new.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def replace_folder(new: Path, path: Path):
    """Give a finished folder the name `path`, then remove what had it before. For the owner of `path`."""
    old = aside(path, "old")
    if path.exists():
        path.rename(old)
    new.rename(path)
    sync(path.parent)
    if old.exists():
        discard(old, path)


def discard(folder: Path, path: Path):
    """Remove a folder that was made for `path`: out of sight first, so that no half of it passes for a whole one."""
    gone = aside(path, "gone")
    with in_words(f"cannot remove {folder}"):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def recover(path: Path):
    """Put right what a killed or failed owner of `path` left: a replaced folder that no new one follows comes back."""
    if not path.parent.is_dir():
        return
    name = re.escape(path.name)
    for old in asides(path.parent, name, "old"):
        if path.exists():
            discard(old, path)
        else:
            old.rename(path)
    for left in asides(path.parent, name, "(new|gone)"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def owner(path: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside, no other process owns `path`: a lock on a file beside it, which the system frees when its owner dies.

    UserError that names the owner if there is one; with `wait` that is told once, and waited for. Where no lock file
    can be made, nothing else can either, and there is nothing to own. Folders made for the lock go if they stay empty.
    What an owner that was killed, or fails in here, leaves half done is put right.
    """
    real = Path(os.path.realpath(path))
    lock = real.parent / f".{real.name}.lock"
    made = [folder for folder in lock.parents if not folder.exists()]
    handle, told = None, False
    try:
        while (handle := _locked(lock)) is None:
            who = f"{path} is in use by {_holder(lock)}"
            require(wait is not None, f"{who}; wait until it has ended, or choose another folder")
            if not told:
                wait(f"{who}: waiting for it to end")
            told = True
            time.sleep(0.1)
    except OSError as e:
        nowhere = e.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not lock.exists()
        no_folder = isinstance(e, (FileExistsError, NotADirectoryError))
        require(nowhere, f"cannot write {lock}: {'that is in no folder' if no_folder else e.strerror}")
    try:
        recover(path)
        yield
    finally:
        with suppress(OSError):
            recover(path)
        if handle is not None:
            with suppress(OSError):  # Windows keeps a file that is open
                lock.unlink()
            os.close(handle)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _locked(lock: Path) -> int | None:
    """A handle of the lock file, locked by us; None if another process has it."""
    while True:
        handle = _opened(lock)
        if not _lock(handle):
            os.close(handle)
            return None
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # its last owner removed it between our two steps
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):  # a full disk takes no text, but a lock
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()} since {since}".encode())
    return handle


def _opened(lock: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    for _ in range(9):
        lock.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # an owner that ends removes the folder that it made
            return os.open(lock, flags, 0o666)
    return os.open(lock, flags, 0o666)


def _lock(handle: int) -> bool:
    try:
        try:
            import fcntl
        except ImportError:
            import msvcrt

            os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as e:
        if e.errno not in UNKNOWN:
            raise
        warnings.warn("this file system knows no locks: let no two commands write here at once", stacklevel=2)
    return True


def _holder(lock: Path) -> str:
    """Who has the lock, as they wrote it down."""
    with suppress(OSError):
        words = lock.read_bytes()[:200].decode(errors="replace")
        return "".join(filter(str.isprintable, words)) or "another process"
    return "another process"


def check_output(path: Path, kind: str, *inputs: Path | None):
    """UserError unless a file of a kind (".html") can be written at `path`, and nothing is lost by it.

    What stands there may be replaced if it is of that kind, and neither an input nor a file of a run or a data set.
    """
    folder = path.parent
    require(folder.is_dir(), f"cannot write {path}: there is no folder {folder}")
    require(os.access(folder, os.W_OK), f"cannot write {path}: nothing can be written in {folder}")
    if not path.exists() and not path.is_symlink():
        return
    require(path.is_file() and not path.is_symlink(), f"cannot write {path}: it is a folder, a link or a device")
    require(path.suffix == kind, f"{path} exists and is no {kind} file; choose another name")
    for given in filter(None, inputs):
        require(not (given.exists() and path.samefile(given)), f"{path} is what is read; choose another name to write")
    whole = path.suffix in KEPT and any((folder / name).is_file() for name in ("config.json", "manifest.json"))
    require(not whole, f"{path} is a file of the run or data set {folder}; choose another name")


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
