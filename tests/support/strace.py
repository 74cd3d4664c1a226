"""System calls of a child, seen and disturbed by the kernel: strace attached to a child that waits to begin.

Children come from a warm ``ForkServer``, which leaves them nothing to import: a trace is the store's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.fork_server import Child

_ATTACH_SECONDS = 300.0  # only against a hang
_TEXT_BYTES = 64  # of a buffer; paths are never cut

_WHOLE = re.compile(r"(?P<name>\w+)\((?P<args>.*)\)\s+= (?P<result>.+)")
_BEGUN = re.compile(r"(?P<begin>\w+\(.*) <unfinished \.\.\.>")
_ENDED = re.compile(r"<\.\.\. \w+ resumed>(?P<end>.*)")
_TOKEN = re.compile(r'(?P<number>\d+|AT_FDCWD)<(?P<open>[^>]*)>|"(?P<text>(?:[^"\\]|\\.)*)"(?P<cut>\.\.\.)?')
# fmt: off
# a descriptor of a folder, then a name in it
_IN_FOLDER = frozenset({
    "openat", "openat2", "unlinkat", "renameat", "renameat2", "mkdirat", "symlinkat", "linkat", "newfstatat", "statx",
    "faccessat", "faccessat2", "readlinkat", "fchmodat", "fchownat", "utimensat", "mknodat",
})
# calls that change a file or a folder, or what they hold on to
CHANGING = (
    "openat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "rename", "renameat", "renameat2", "symlink",
    "symlinkat", "mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "flock",
)
# calls that change no file, whatever their arguments
_READING = frozenset({
    "newfstatat", "fstat", "stat", "lstat", "statx", "statfs", "fstatfs", "access", "faccessat", "faccessat2", "read",
    "pread64", "readv", "preadv", "preadv2", "lseek", "getdents64", "readlink", "readlinkat", "munmap", "fadvise64",
    "close",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class TracedCall:
    """One system call: its arguments as strace shows them, the absolute paths it touches, and what it returned."""

    thread: int
    name: str
    args: str
    result: str

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of names and of open descriptors, in the order of the arguments."""
        found = []
        folder: str | None = None
        for token in _TOKEN.finditer(self.args):
            text = token["text"]
            if text is None:
                folder = token["open"]
                if self.name not in _IN_FOLDER:
                    found.append(folder)
            elif self.name in _IN_FOLDER and folder is not None:
                found.append(str(Path(folder, text)))
                folder = None
            elif text.startswith("/") and token["cut"] is None:
                found.append(text)
        return tuple(found)

    @property
    def path(self) -> str:
        """The path it changes or reads: the new name of a rename or link."""
        return self.paths[-1] if self.paths else ""

    @property
    def text(self) -> str:
        """The first string among its arguments, cut."""
        found = re.search(r'"((?:[^"\\]|\\.)*)"', self.args)
        return found[1] if found else ""

    @property
    def descriptor(self) -> str:
        """The number of the file it opens or works on."""
        found = re.match(r"(\d+)<", self.result if self.name == "openat" else self.args)
        return found[1] if found else ""

    @property
    def failed(self) -> bool:
        """Whether it returned an error, or never returned."""
        return self.result.startswith(("-1", "?"))

    @property
    def injected(self) -> bool:
        """Whether its result is the tracer's."""
        return self.result.endswith("(INJECTED)")

    @property
    def only_reads(self) -> bool:
        """Whether a call of this kind, with these arguments, can change no file."""
        if self.name == "mmap":
            return "MAP_SHARED" not in self.args or "PROT_WRITE" not in self.args
        if self.name == "ioctl":
            return "TCGETS" in self.args
        if self.name == "fcntl":
            return "F_DUPFD" in self.args or "F_GETF" in self.args or "F_SETFD" in self.args
        if self.name == "openat":
            return not re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_TMPFILE", self.args)
        return self.name in _READING


def parse_trace(lines: Iterable[str]) -> Iterator[TracedCall]:
    """Calls of a ``strace -f -y`` log in the order they began; a call cut by another thread is put together."""
    begun: dict[int, int] = {}
    whole: list[tuple[int, str]] = []
    for line in lines:
        number, _, rest = line.rstrip("\n").partition(" ")
        thread, rest = int(number), rest.strip()
        if ended := _ENDED.fullmatch(rest):
            if thread in begun:
                position = begun.pop(thread)
                whole[position] = (thread, whole[position][1] + ended["end"])
        elif unfinished := _BEGUN.fullmatch(rest):
            begun[thread] = len(whole)
            whole.append((thread, unfinished["begin"]))
        elif not rest.startswith(("---", "+++", "???")):  # signals, exits, and what strace lets go
            whole.append((thread, rest))
    for thread, text in whole:
        # a call that never returned: its thread was killed
        call = _WHOLE.fullmatch(text) or _WHOLE.fullmatch(f"{text}) = ?")
        assert call is not None, f"strace wrote what is no call: {text!r}"
        yield TracedCall(thread, call["name"], call["args"], call["result"])


def find_strace() -> str:
    """The program; skips the test, with the reason, where it is missing or may not trace."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed (Debian: apt install strace)")
    probe = subprocess.run([strace, "-qq", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"strace may not trace here (run as root, or allow ptrace): {probe.stderr.strip()}")
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if os.geteuid() != 0 and scope.exists() and scope.read_text().strip() != "0":
        pytest.skip("strace may trace here only what it started: run as root, or set kernel.yama.ptrace_scope to 0")
    return strace


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracer:
    """strace, to be attached to children that were started ``held``; ``log`` is overwritten by each."""

    program: str
    log: Path

    def follow(
        self, child: Child, *, calls: Iterable[str] = (), paths: Iterable[str] = (), inject: str | None = None
    ) -> tuple[int, list[TracedCall]]:
        """Let ``child`` begin and follow it to its end: its exit code as of ``Child.wait``, and its calls.

        Parameters
        ----------
        calls, paths
            Only calls of these names, and only if they touch one of these paths; nothing given is everything.
        inject
            strace's ``NAME:error=ERRNO:when=N`` or ``NAME:signal=KILL:when=N``; N counts calls that touch ``paths``.
        """
        command = [self.program, "-f", "-qq", "-y", "-s", str(_TEXT_BYTES), "-e", "signal=none", "-o", str(self.log)]
        if calls:
            command += ["-e", f"trace={','.join(calls)}"]
        if inject:
            command += ["-e", f"inject={inject}"]
        for path in paths:
            command += ["-P", path]
        with subprocess.Popen([*command, "-p", str(child.pid)], stderr=subprocess.PIPE, text=True) as process:
            _wait_until_traced(child.pid, process)
            child.resume()
            code = child.wait()
            said = process.communicate()[1]  # it ends with its child, and has then written everything
        assert process.returncode == 0, said
        with self.log.open() as lines:
            return code, list(parse_trace(lines))


def _wait_until_traced(pid: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _ATTACH_SECONDS
    while "\nTracerPid:\t0\n" in (status := Path(f"/proc/{pid}/status").read_text()) or "\nState:\tt" not in status:
        assert process.poll() is None, f"strace ended: {process.communicate()[1]}"
        assert time.monotonic() < deadline, "strace did not attach"
        time.sleep(0.0005)
