"""Which filesystem a folder is on, and that its name is on disk: locks and fsync are trusted on local disks only.

It never writes to a file.
"""

from __future__ import annotations

import os
import re

from sessiond import errors

MOUNTINFO = "/proc/self/mountinfo"

NETWORK_FILESYSTEMS = {"9p", "afs", "cifs", "coda", "ncpfs", "nfs", "nfs4", "smb3", "smbfs"}
CLUSTER_FILESYSTEMS = {"beegfs", "ceph", "glusterfs", "gpfs", "lustre", "orangefs", "pvfs2"}
# Any other FUSE filesystem is taken for remote (sshfs, s3fs, gcsfuse, ...): a wrong refusal costs the operator another
# folder, a wrong trust costs turns. `fuseblk` is a local disk by definition and needs no entry.
LOCAL_FUSE_FILESYSTEMS = {"bindfs", "cryfs", "encfs", "ext2", "fuse-overlayfs", "fuse2fs", "gocryptfs", "mergerfs"}


def filesystem_of(path: str, mountinfo: str) -> str:
    """The type of the filesystem that holds the absolute path, by the text of /proc/self/mountinfo (proc(5)); or ''.

    The longest mount point wins, and of equal ones the last, which hides the others.
    """
    found, longest = "", -1
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        fields = mount.split(" ")
        if len(fields) < 6:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]).rstrip("/")
        if len(point) >= longest and (path == point or path.startswith(point + "/")):
            found, longest = source.split(" ")[0], len(point)
    return found


def refuse_network(root: str, setting: str) -> None:
    """Raises Invalid NETWORK_FILESYSTEM if the absolute path is on one. setting: what the operator calls the path."""
    os.path.exists(root)  # an automount shows its real type only once it was touched
    try:
        with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape") as mounts:
            kind = filesystem_of(root, mounts.read())
    except OSError:
        return  # not Linux: the probe at start is what remains
    family, _, name = kind.partition(".")
    if kind in NETWORK_FILESYSTEMS | CLUSTER_FILESYSTEMS or (family == "fuse" and name not in LOCAL_FUSE_FILESYSTEMS):
        raise errors.Invalid(
            "NETWORK_FILESYSTEM",
            f"The folder {root} is on a {kind} filesystem.",
            {"folder": root, "filesystem": kind},
            [(setting, f"{root} is on {kind}")],
        )


def settle_names(folder: str) -> None:
    """See to it that the names of what is in the absolute path are on disk, and its own, up to the mount point.

    Any of the folders may have been made just now, by us or by one that was killed. Raises OSError.
    """
    device = os.stat(folder).st_dev
    while os.stat(folder).st_dev == device:
        try:
            at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:
            return  # whoever may not read it has not made what is in it
        try:
            os.fsync(at)
        finally:
            os.close(at)
        if folder == "/":
            return
        folder = os.path.dirname(folder)
