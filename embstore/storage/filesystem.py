"""Where a store lies: what its file system does not promise, said before work begins."""

from __future__ import annotations

import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")  # Linux; elsewhere nothing is said
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_IN_A_CONTAINER = frozenset({"overlay", "aufs"})
_ON_A_SERVER = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs"})


def caveat(path: Path) -> str | None:
    """What durability on the file system of ``path`` (an existing folder) depends on, or None for a local disk."""
    kind = file_system(path)
    if kind in _IN_MEMORY:
        return f"{path} is on {kind}: it is memory, nothing there survives a reboot"
    if kind in _IN_A_CONTAINER:
        return f"{path} is in a container's own layer ({kind}): it is gone with the container, a mounted volume is not"
    if kind in _ON_A_SERVER or kind.startswith("fuse."):
        return f"{path} is on {kind}: whether syncs are durable and locks exclusive is up to its server, not promised here"
    return None


def file_system(path: Path, *, mounts: Path = _MOUNTS) -> str:
    """Type of the file system that ``path`` lies on, as the kernel names it; "" where that cannot be told."""
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
        # later lines lie over earlier ones at the same place
        if resolved.is_relative_to(mount) and len(mount.parts) >= len(found.parts):
            found, kind = mount, after.split(" ")[0]
    return kind
