"""One writer per store: two at once, a killed holder, a forked child that has its lock, a file system without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from embstore.core.errors import ExitCode, StoreLockedError
from embstore.storage.writer import StoreWriter
from tests.support.fork_server import ForkServer
from tests.support.stores import build_small, snapshot, whole_tree
from tests.support.tally import Counter


@pytest.mark.parametrize("races", [6, pytest.param(100, marks=pytest.mark.faults)])
def test_of_two_writers_that_race_one_builds_and_one_is_refused(
    races: int, fork_server: ForkServer, small_prompts: Path, finished_store: Path, tmp_path: Path, tally: Counter
) -> None:
    with ForkServer() as other_server:
        for race in range(races):
            store = tmp_path / str(race)
            writers = [server.start("build", store, small_prompts) for server in (fork_server, other_server)]
            codes = sorted(writer.wait() for writer in writers)
            # the second may also come when the first is done, and then finds a finished store
            assert codes in ([0, 0], [0, ExitCode.LOCKED]), [writer.lines for writer in writers]
            is_wrong = snapshot(store) != snapshot(finished_store) or bool(writers[0].computed & writers[1].computed)
            tally("two writers at once", losses=int(is_wrong))
            assert not is_wrong


def _script(store: Path, body: str) -> subprocess.Popen[str]:
    """A process that opens a StoreWriter, then does ``body``; says a line when it is there."""
    program = f"""
        import os, sys, time
        from pathlib import Path
        from embstore.storage.writer import StoreWriter
        writer = StoreWriter(Path({str(store)!r}), resume=True)
    """
    source = textwrap.dedent(program) + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent(unfinished: Path, tally: Counter) -> None:
    body = """
        child = os.fork()
        if child == 0:
            print(os.getpid(), flush=True)
            sys.stdin.read()  # alive until the test ends, as a data loader's worker would be
            os._exit(0)
        time.sleep(60)
    """
    with _script(unfinished, body) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        with pytest.raises(StoreLockedError, match=f'"pid": {parent.pid}'):
            StoreWriter(unfinished, resume=True)
        parent.kill()
        assert parent.wait() == -signal.SIGKILL
        os.kill(child, 0)
        StoreWriter(unfinished, resume=True).close()
        tally("lock inherited by a forked child, parent killed")


def test_a_forked_child_that_ends_does_not_free_the_lock(unfinished: Path) -> None:
    body = """
        child = os.fork()
        if child == 0:
            writer.close()
            os._exit(0)
        os.waitpid(child, 0)
        print("ended", flush=True)
        sys.stdin.read()
    """
    with _script(unfinished, body) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ended\n"
        with pytest.raises(StoreLockedError):
            StoreWriter(unfinished, resume=True)
        parent.communicate("")
    StoreWriter(unfinished, resume=True).close()


def test_a_child_started_by_exec_does_not_have_the_lock(unfinished: Path) -> None:
    body = """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=0, close_fds=False)
        print(child.pid, flush=True)
        time.sleep(60)
    """
    with _script(unfinished, body) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        os.kill(child, 0)
        StoreWriter(unfinished, resume=True).close()


@pytest.mark.parametrize("content", [b"", b"no JSON", b"\xff\xfe\x00", b'{"pid": 1}', b"x" * 100_000])
def test_what_a_dead_writer_left_in_the_lock_file_means_nothing(content: bytes, unfinished: Path) -> None:
    (unfinished / ".lock").write_bytes(content)
    with StoreWriter(unfinished, resume=True):
        with pytest.raises(StoreLockedError, match=f'"pid": {os.getpid()}'):
            StoreWriter(unfinished, resume=True)
        assert len((unfinished / ".lock").read_bytes()) < 200


def test_what_stands_in_a_held_lock_is_only_quoted(unfinished: Path) -> None:
    with (unfinished / ".lock").open("wb") as holder:
        holder.write(b"\xff\x1b[31m no JSON")
        holder.flush()
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(StoreLockedError, match="another process is writing") as caught:
            StoreWriter(unfinished, resume=True)
    assert caught.value.exit_code == ExitCode.LOCKED
    assert "\x1b" not in str(caught.value), "a terminal would obey it"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_cannot_lock_is_refused(
    code: int, unfinished: Path, small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Counter
) -> None:
    def fail(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    before = whole_tree(unfinished)
    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(StoreLockedError, match="cannot lock files") as caught:
        build_small(small_prompts, unfinished)
    assert os.strerror(code) in str(caught.value)
    assert "local disk" in str(caught.value.hint)
    assert whole_tree(unfinished) == before
    with pytest.raises(StoreLockedError):
        build_small(small_prompts, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    tally("file system without flock")
