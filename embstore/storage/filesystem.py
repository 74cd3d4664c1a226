"""What the file system of a store does not promise; reported before work begins."""

from __future__ import annotations

import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")  # Linux only; other systems get no warning
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_IN_A_CONTAINER = frozenset({"overlay", "aufs"})
_ON_A_SERVER = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs"})


def caveat(path: Path) -> str | None:
    """What durability on the file system of ``path`` (an existing folder) depends on, or None for a local disk."""
    kind = file_system(path)
    if kind in _IN_MEMORY:
        return f"{path} is on {kind}, which is memory: nothing there survives a reboot"
    if kind in _IN_A_CONTAINER:
        return f"{path} is in the writable layer of a container ({kind}) and is deleted with it; use a mounted volume"
    if kind in _ON_A_SERVER or kind.startswith("fuse."):
        return f"{path} is on {kind}: only its server decides whether syncs are durable and locks exclusive"
    return None


def file_system(path: Path, *, mounts: Path = _MOUNTS) -> str:
    """Type of the file system that ``path`` lies on, as the kernel names it; "" if it is unknown."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    resolved = path.resolve()
    found, kind = Path(), ""
    for line in lines:
        # proc(5): ID PARENT DEVICE ROOT MOUNT-POINT OPTIONS [TAGS...] - TYPE SOURCE OPTIONS; spaces are \040
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        mount = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
        # later mounts hide earlier ones at the same place
        if resolved.is_relative_to(mount) and len(mount.parts) >= len(found.parts):
            found, kind = mount, after.split(" ")[0]
    return kind
