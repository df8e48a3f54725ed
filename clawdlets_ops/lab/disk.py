"""A machine's disk: an overlay of its own changes over the one Debian base, and the switch to a newly installed system.

``disk/`` holds the changes, ``root/`` is where the whole is mounted while the machine runs. The guest is root on its disk:
what it left there is never followed through a symbolic link.

An installer lays a system into ``/mnt``, as on a freshly formatted disk. When a reboot finds a system profile there, the
content of ``/mnt`` becomes the disk. The base below it then plays the part of the system's closure.
"""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from dataclasses import dataclass
from pathlib import Path

from clawdlets_ops.files import ensure_dir
from clawdlets_ops.lab.backend import MachineSpec
from clawdlets_ops.lab.processes import mounts_below
from clawdlets_ops.process import Command, Runner

PROFILE = "nix/var/nix/profiles/system"

_XATTRS = "trusted.overlay."
_TIMEOUT_S = 30.0
# Nothing of a directory's place in the old overlay may matter in the new one.
_OPTIONS = "index=off,redirect_dir=off,metacopy=off"


@dataclass(frozen=True)
class Disk:
    """The disk of the machine whose folder this is. Not to be used from two threads at once."""

    folder: Path
    base: Path
    runner: Runner

    @property
    def upper(self) -> Path:
        return self.folder / "disk"

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def mounted(self) -> bool:
        return bool(mounts_below(self.root))

    @property
    def installed(self) -> bool:
        """Whether the system on the disk is one that an installer laid there."""
        return (self.upper / PROFILE).is_symlink()

    def make(self) -> None:
        """An empty disk, whatever was there before."""
        for name in ("disk", "disk.new", "disk.old"):
            _remove(self.folder / name)
        for name in ("disk", "root"):
            ensure_dir(self.folder / name, 0o755)

    def mount(self) -> None:
        """Mount the disk, after a switch that is due; CommandError."""
        if self.mounted:
            return
        self.switch()
        _give_machine_id(self.upper)
        _remove(self.folder / "work")
        ensure_dir(self.folder / "work")
        layers = f"lowerdir={self.base.resolve()},upperdir={self.upper},workdir={self.folder / 'work'},{_OPTIONS}"
        self._run("mount", "-t", "overlay", "-o", layers, "clawdlets-lab", str(self.root))

    def unmount(self) -> None:
        """Unmount it, with whatever was mounted below."""
        for point in mounts_below(self.root):
            self._run("umount", str(point))

    def switch(self) -> bool:
        """Make an installed ``/mnt`` the disk, and finish a switch that was interrupted; whether there was one.

        Renames only, in an order that can be taken up again at any point: after the first, the decision stands.
        """
        new, old = self.folder / "disk.new", self.folder / "disk.old"
        mnt = self.upper / "mnt"
        if not new.exists():
            _remove(old)
            if not (mnt / PROFILE).is_symlink() or not _is_dir(mnt):
                return False
            mnt.rename(new)
        _forget_old_overlay(new)
        if self.upper.exists():
            _remove(old)
            self.upper.rename(old)
        new.rename(self.upper)
        _remove(old)
        return True

    def seed(self, spec: MachineSpec) -> None:
        """Write what makes the base this server, into an empty disk that is not mounted; CommandError."""
        root = self.upper
        _write(root / "etc/hostname", f"{spec.name}\n")
        _write(root / "etc/hosts", f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {spec.name}\n")
        ensure_dir(root / "root", 0o700)
        ensure_dir(root / "root/.ssh", 0o700)
        _write(root / "root/.ssh/authorized_keys", "".join(f"{key}\n" for key in spec.authorized_keys), 0o600)
        if spec.user_data:
            _write(root / "var/lib/cloud/seed/nocloud/user-data", spec.user_data, 0o600)
        ensure_dir(root / "etc/ssh", 0o755)
        key = root / "etc/ssh/ssh_host_ed25519_key"
        self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"root@{spec.name}", "-f", str(key))

    def remove(self) -> None:
        """Remove the machine's whole folder; it must not be mounted."""
        self.unmount()
        _remove(self.folder)

    def _run(self, *argv: str) -> None:
        self.runner.run(Command(argv, "prepare a machine's disk", timeout_s=_TIMEOUT_S)).check()


def _give_machine_id(upper: Path) -> None:
    """A machine-id of its own for a new disk that has none: the base's would be everybody's."""
    etc = upper / "etc"
    if not os.path.lexists(etc):
        ensure_dir(etc, 0o755)
    if _is_dir(etc) and not os.path.lexists(etc / "machine-id"):
        _write(etc / "machine-id", f"{uuid.uuid4().hex}\n", 0o444)


def _forget_old_overlay(tree: Path) -> None:
    """Remove overlayfs's marks: a folder made below a merged one is *opaque*, and would hide the base's."""
    for folder, folders, names in os.walk(tree):
        for path in [folder, *(os.path.join(folder, name) for name in (*folders, *names))]:
            for attribute in os.listxattr(path, follow_symlinks=False):
                if attribute.startswith(_XATTRS):
                    os.removexattr(path, attribute, follow_symlinks=False)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    if not path.parent.exists():
        ensure_dir(path.parent, 0o755)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(fd, "w") as handle:
        os.fchmod(handle.fileno(), mode)
        handle.write(text)


def _is_dir(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def _remove(path: Path) -> None:
    if os.path.lexists(path):
        shutil.rmtree(path)
