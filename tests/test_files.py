"""Files: whole or not at all, one owner at a time, and only over what is ours; also where the system refuses things.

Windows is imitated: a shim refuses what Windows refuses. Nothing here ran on Windows.
"""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

from minqstar import files
from minqstar.errors import UserError
from minqstar.files import aside, check_output, owner, recover, replace_file, sync


def other(folder: Path, code: str) -> subprocess.Popen:
    """Another process, which runs some lines of Python."""
    lines = f"import sys, time\nfrom pathlib import Path\nfrom minqstar.files import *\n{code}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", lines], cwd=folder, env=ENVIRONMENT, **pipes)


HOLD = "with owner(Path('new/runs/dpo')):\n    print('mine', flush=True)\n    sys.stdin.readline()"


def test_one_process_owns_a_path_and_the_next_one_says_who(tmp_path):
    holder = other(tmp_path, HOLD)
    assert holder.stdout.readline() == "mine\n"
    said = rf"new/runs/dpo is in use by process {holder.pid} on .* since 2\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d; wait until"
    with pytest.raises(UserError, match=said) as error, owner(tmp_path / "new/runs/dpo"):
        pytest.fail("two owners")
    assert "\n" not in str(error.value)
    with owner(tmp_path / "new/runs/sft"):  # another path
        pass
    holder.communicate("\n")
    assert holder.returncode == 0 and not list(tmp_path.iterdir())  # neither the lock nor the folders made for it


def test_the_system_frees_what_a_killed_owner_had(tmp_path):
    holder = other(tmp_path, HOLD)
    assert holder.stdout.readline() == "mine\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    left = tmp_path / "new/runs/.dpo.lock"
    assert left.exists()
    with owner(tmp_path / "new/runs/dpo"):
        assert f"process {os.getpid()} " in left.read_text()
    assert not left.exists()


def test_who_may_wait_is_told_once_for_whom(tmp_path):
    holder, said = other(tmp_path, HOLD), []
    assert holder.stdout.readline() == "mine\n"

    def say(words):
        said.append(words)
        holder.stdin.write("\n")
        holder.stdin.flush()

    with owner(tmp_path / "new/runs/dpo", wait=say):
        assert holder.wait() == 0
    assert len(said) == 1 and f"in use by process {holder.pid} " in said[0]


def test_many_processes_take_turns(tmp_path):
    """Each adds one to a number, read and written apart, 40 times: none is lost, though locks come and go."""
    (tmp_path / "count").write_text("0")
    code = """
for _ in range(40):
    with owner(Path("count"), wait=lambda _: None):
        number = int(Path("count").read_text())
        Path("count").write_text(str(number + 1))
"""
    code = code.replace("for _", "import minqstar.files\nminqstar.files.time.sleep = lambda _: None\nfor _", 1)
    processes = [other(tmp_path, code) for _ in range(4)]
    assert [p.wait() for p in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "160" and len(list(tmp_path.iterdir())) == 1


def test_a_reader_beside_many_writers_meets_whole_files(tmp_path):
    code = "for i in range(150): replace_file(Path('f'), lambda p: p.write_text(sys.argv[0] * 0 + str(i % 10) * 50000))"
    writers = [other(tmp_path, code) for _ in range(2)]
    seen = set()
    while any(p.poll() is None for p in writers):
        if (tmp_path / "f").exists():
            text = (tmp_path / "f").read_text()
            assert len(text) == 50000 and len(set(text)) == 1
            seen.add(text[0])
    assert [p.returncode for p in writers] == [0, 0] and len(seen) > 2
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / ".dpo.lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(UserError, match=r"cannot write .*\.dpo\.lock"), owner(tmp_path / "dpo"):
        pytest.fail("it was locked")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_where_nothing_can_be_written_there_is_nothing_to_own(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "_locked", refuse)
    with owner(tmp_path / "data"):
        pass


def test_where_no_lock_is_known_one_line_says_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="knows no locks"), owner(tmp_path / "dpo"):
        pass


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF])
def test_a_place_that_syncs_no_folder_can_be_written_in(tmp_path, monkeypatch, number):
    real = os.fsync

    def refuse(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    replace_file(tmp_path / "f", lambda new: new.write_text("x"))
    assert (tmp_path / "f").read_text() == "x"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):  # a disk that is broken is no mount that refuses
        sync(tmp_path)


def test_only_names_with_our_mark_are_put_right(tmp_path):
    for name in ("dpo.old", ".dpo.old", ".dpo.1.old", ".dpo.1-2.gone", ".dpo.x-0123abcd.new", ".sft.1-0123abcd.gone"):
        (tmp_path / name).mkdir()
    before = set(tmp_path.iterdir())
    for end in ("old", "new", "gone"):
        aside(tmp_path / "dpo", end).mkdir()
    recover(tmp_path / "dpo")
    assert set(tmp_path.iterdir()) == before | {tmp_path / "dpo"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("new.html", None),
        ("page.html", None),
        ("nowhere/page.html", "there is no folder"),
        ("page.html/page.html", "there is no folder"),
        ("folder", "it is a folder"),
        (".", "it is a folder"),
        ("link.html", "it is a folder, a link or a device"),
        ("dangling.html", "it is a folder, a link or a device"),
        ("fifo.html", "it is a folder, a link or a device"),
        ("rows.jsonl", "exists and is no .html file"),
        ("model.safetensors", "exists and is no .html file"),
        ("input.html", "is what is read"),
        ("hard.html", "is what is read"),
    ],
)
def test_an_output_that_would_lose_something_is_refused(tmp_path, name, message):
    for file in ("page.html", "rows.jsonl", "model.safetensors", "input.html"):
        (tmp_path / file).write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    (tmp_path / "dangling.html").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo.html")
    os.link(tmp_path / "input.html", tmp_path / "hard.html")
    if message is None:
        check_output(tmp_path / name, ".html", tmp_path / "input.html", None)
        return
    with pytest.raises(UserError, match=message) as error:
        check_output(tmp_path / name, ".html", tmp_path / "input.html", None)
    assert "\n" not in str(error.value)


def test_a_vocabulary_does_not_replace_that_of_a_run(tmp_path, monkeypatch):
    (tmp_path / "vocab.tiktoken").write_text("x")
    check_output(tmp_path / "vocab.tiktoken", ".tiktoken")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is a file of the run or data set"):
        check_output(tmp_path / "vocab.tiktoken", ".tiktoken")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as one who may write anywhere
    with pytest.raises(UserError, match="nothing can be written in"):
        check_output(tmp_path / "new.tiktoken", ".tiktoken")


@pytest.fixture
def windows(monkeypatch):
    """Refuse what Windows refuses: to open a folder, to sync a reader's handle, to rename or remove what is open.

    Its locks come from msvcrt, whose locked bytes nobody else can read.
    """
    real_open, real_sync, flags_of, locked = os.open, os.fsync, fcntl.fcntl, {}

    def handles() -> dict[int, str]:
        """Every open file of this process, and where it is."""
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
        return {n: os.readlink(f"/proc/self/fd/{n}") for n in numbers if os.path.lexists(f"/proc/self/fd/{n}")}

    def in_use(path: str) -> bool:
        real = os.path.realpath(path)
        maps = Path("/proc/self/maps").read_text().splitlines()
        mapped = [line.split(maxsplit=5)[5] for line in maps if " /" in line]
        return any(name == real or name.startswith(real + os.sep) for name in (*handles().values(), *mapped))

    def refusing(real):
        def operation(*paths, **kwargs):
            if not kwargs.get("dir_fd") and any(map(in_use, paths)):
                raise PermissionError(errno.EACCES, "The process cannot access the file", str(paths[0]))
            return real(*paths, **kwargs)

        return operation

    def open_file(path, flags, *args, **kwargs):
        if os.path.isdir(path) and sys._getframe(1).f_code.co_filename != shutil.__file__:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, flags, *args, **kwargs)

    def sync_writer(handle):
        if flags_of(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real_sync(handle)

    def locking(handle, mode, count):
        assert os.lseek(handle, 0, os.SEEK_CUR) >= 2**20  # a locked text could not be read
        of = os.fstat(handle).st_ino
        holder = locked.get(of, handle)
        if holder != handle and holder in handles() and os.fstat(holder).st_ino == of:
            raise PermissionError(errno.EACCES, "Permission denied")
        locked[of] = handle

    for name in ("rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", sync_writer)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setitem(sys.modules, "fcntl", None)


def test_locks_as_windows_has_them(windows, tmp_path):
    with (
        owner(tmp_path / "dpo"),
        pytest.raises(UserError, match=rf"in use by process {os.getpid()} on"),
        owner(tmp_path / "dpo"),
    ):
        pytest.fail("two owners")
    with owner(tmp_path / "dpo"):
        pass
