"""The file system below a store is named when it promises less than a disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from embstore.core.events import Event, Notice
from embstore.storage import filesystem
from tests.support.stores import build_small

MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /mnt rw - tmpfs none rw,size=4k
24 22 0:22 / /mnt/a\040share rw,nosuid shared:2 master:1 - nfs4 server:/export rw
25 24 0:23 / /mnt/a\040share/disk rw - xfs /dev/vdb rw
26 22 0:24 / /over rw - tmpfs none rw
27 26 0:25 / /over rw - overlay overlay rw,lowerdir=/a
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/someone", "ext4"),
        ("/mnt", "tmpfs"),
        ("/mnt/other", "tmpfs"),
        ("/mntx", "ext4"),
        ("/mnt/a share/stores", "nfs4"),
        ("/mnt/a share/disk/store", "xfs"),
        ("/over/store", "overlay"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_nearest_mount(path: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert filesystem.file_system(Path(path), mounts=tmp_path / "mountinfo") == kind


def test_where_mounts_cannot_be_read_nothing_is_said(tmp_path: Path) -> None:
    assert filesystem.file_system(tmp_path, mounts=tmp_path / "no file") == ""


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("tmpfs", "nothing there survives a reboot"),
        ("overlay", "deleted with it"),
        ("nfs", "only its server decides"),
        ("fuse.sshfs", "only its server decides"),
        ("ext4", None),
        ("", None),
    ],
)
def test_a_build_says_once_what_its_place_does_not_promise(
    kind: str, says: str | None, small_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "file_system", lambda path: kind)
    events: list[Event] = []
    build_small(small_prompts, tmp_path / "store", observer=events.append)
    said = [event.message for event in events if isinstance(event, Notice) and str(tmp_path / "store") in event.message]
    about_place = [message for message in said if "quarantine.jsonl" not in message]
    assert len(about_place) == (says is not None)
    assert all(str(says) in message for message in about_place)
