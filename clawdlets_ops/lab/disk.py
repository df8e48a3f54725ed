"""A machine's disk: an overlay of its own changes over the one Debian base, and the switch to a newly installed system.

``disk/`` holds the changes, ``root/`` is where the whole is mounted while the machine runs. The guest is root on its disk:
what it left there is never followed through a symbolic link.

An installer lays a system into ``/mnt``, as on a freshly formatted disk. When a reboot finds a system profile there, the
content of ``/mnt`` becomes the disk. The base below it then plays the part of the system's closure.

The rescue system is a fresh overlay over the same base, with the server's own disk at ``/mnt/disk``. A snapshot is a copy
of the changes.
"""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from clawdlets_ops.files import ensure_dir
from clawdlets_ops.lab import first_boot
from clawdlets_ops.lab.backend import MachineSpec
from clawdlets_ops.lab.processes import mounts_below
from clawdlets_ops.process import Command, Runner

PROFILE = "nix/var/nix/profiles/system"
RESCUE_MOUNT = "mnt/disk"

_XATTRS = "trusted.overlay."
_TIMEOUT_S = 30.0
_COPY_TIMEOUT_S = 600.0
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

    def make(self, image: Path | None = None) -> None:
        """A fresh disk, empty or as in the snapshot, whatever was there before; CommandError."""
        for name in ("disk", "disk.new", "disk.old", "rescue"):
            remove_tree(self.folder / name)
        ensure_dir(self.root, 0o755)
        if image is None:
            ensure_dir(self.upper, 0o755)
        else:
            copy_tree(image, self.upper, self.runner)

    def mount(self) -> None:
        """Mount the disk, after a switch that is due; CommandError."""
        if self.mounted:
            return
        self.switch()
        _give_machine_id(self.upper)
        self._overlay(self.upper, self.folder / "work", self.root)

    def mount_rescue(self, spec: MachineSpec, keys: tuple[str, ...]) -> None:
        """Mount a fresh rescue system for root with these keys, and the disk inside it; CommandError.

        What an installer leaves in the rescue system's ``/mnt`` goes with it: a system is installed from the disk.
        """
        if self.mounted:
            return
        self.switch()  # what was installed is what is on the disk
        rescue = self.folder / "rescue"
        remove_tree(rescue)
        upper = ensure_dir(rescue / "disk", 0o755)
        Disk(rescue, self.base, self.runner).seed(replace(spec, name="rescue", authorized_keys=keys, user_data=""))
        _give_machine_id(upper)
        ensure_dir(upper / RESCUE_MOUNT, 0o755)
        self._overlay(upper, rescue / "work", self.root)
        self._overlay(self.upper, self.folder / "work", self.root / RESCUE_MOUNT)

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
            remove_tree(old)
            if not (mnt / PROFILE).is_symlink() or not _is_dir(mnt):
                return False
            mnt.rename(new)
        _forget_old_overlay(new)
        if self.upper.exists():
            remove_tree(old)
            self.upper.rename(old)
        new.rename(self.upper)
        remove_tree(old)
        return True

    def seed(self, spec: MachineSpec) -> None:
        """Write what makes this server of an unmounted disk that is empty or a snapshot's; CommandError.

        As with cloud-init, host keys are always new, and root's keys are added to those of a snapshot.
        """
        root, seed = self.upper, first_boot.SEED
        _write(root, "etc/hostname", f"{spec.name}\n")
        lsblk = resources.files("clawdlets_ops.lab") / "profile" / "stand-in-lsblk"
        _write(root, "usr/local/bin/lsblk", lsblk.read_text(), 0o755)
        # The real nixos-anywhere asks for cpio, which its kexec needs and the lab's has no use for.
        _write(root, "usr/local/bin/cpio", "#!/bin/sh\necho a stand-in of the lab, no cpio >&2; exit 1\n", 0o755)
        _write(root, "etc/hosts", f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {spec.name}\n")
        _place(root, "root/.ssh/authorized_keys")
        for folder in ("root", "root/.ssh"):
            (root / folder).chmod(0o700)
        keys = _read(root / "root/.ssh/authorized_keys").splitlines()
        keys += [key for key in spec.authorized_keys if key not in keys]
        _write(root, "root/.ssh/authorized_keys", "".join(f"{key}\n" for key in keys), 0o600)
        _write(root, f"{seed}/meta-data", first_boot.meta_data(spec.server_id, spec.name))
        remove_tree(_place(root, f"{seed}/user-data"))
        if spec.user_data:
            _write(root, f"{seed}/user-data", spec.user_data, 0o600)
            script = first_boot.script(spec.user_data, spec.server_id)
            _write(root, f"{first_boot.instance_dir(spec.server_id)}/first-boot.sh", script, 0o700)
            _write(root, f"etc/systemd/system/{first_boot.UNIT}", first_boot.unit(spec.server_id))
            wanted = _place(root, f"etc/systemd/system/multi-user.target.wants/{first_boot.UNIT}")
            remove_tree(wanted)
            wanted.symlink_to(f"../{first_boot.UNIT}")
        key = _place(root, "etc/ssh/ssh_host_ed25519_key")
        for old in (key, key.with_name(f"{key.name}.pub")):
            remove_tree(old)
        self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"root@{spec.name}", "-f", str(key))

    def remove(self) -> None:
        """Remove the machine's whole folder; it must not be mounted."""
        self.unmount()
        remove_tree(self.folder)

    def _overlay(self, upper: Path, work: Path, at: Path) -> None:
        remove_tree(work)
        ensure_dir(work)
        layers = f"lowerdir={self.base.resolve()},upperdir={upper},workdir={work},{_OPTIONS}"
        self._run("mount", "-t", "overlay", "-o", layers, "clawdlets-lab", str(at))

    def _run(self, *argv: str) -> None:
        self.runner.run(Command(argv, "prepare a machine's disk", timeout_s=_TIMEOUT_S)).check()


def _give_machine_id(upper: Path) -> None:
    """A machine-id of its own for a new disk that has none: the base's would be everybody's."""
    etc = upper / "etc"
    if not os.path.lexists(etc):
        ensure_dir(etc, 0o755)
    if _is_dir(etc) and not os.path.lexists(etc / "machine-id"):
        _write(upper, "etc/machine-id", f"{uuid.uuid4().hex}\n", 0o444)


def _forget_old_overlay(tree: Path) -> None:
    """Remove overlayfs's marks: a folder made below a merged one is *opaque*, and would hide the base's."""
    for folder, folders, names in os.walk(tree):
        for path in [folder, *(os.path.join(folder, name) for name in (*folders, *names))]:
            for attribute in os.listxattr(path, follow_symlinks=False):
                if attribute.startswith(_XATTRS):
                    os.removexattr(path, attribute, follow_symlinks=False)


def copy_tree(source: Path, target: Path, runner: Runner) -> None:
    """Copy a disk with all that overlayfs wrote into it; the copy is there whole or not at all. CommandError."""
    new = target.with_name(f"{target.name}.copy")
    remove_tree(new)
    argv = ["cp", "--archive", "--reflink=auto", "--no-target-directory", str(source), str(new)]
    runner.run(Command(argv, "copy a machine's disk", timeout_s=_COPY_TIMEOUT_S)).check()
    remove_tree(target)
    new.rename(target)


def remove_tree(path: Path) -> None:
    """Remove a folder, a file or a link, or nothing; never what a link leads to."""
    if not os.path.lexists(path):
        return
    if _is_dir(path):
        shutil.rmtree(path)
    else:
        path.unlink()


def _place(root: Path, name: str) -> Path:
    """Where the file is to be, with real folders above it: links that a guest left in their place go."""
    path = root / name.lstrip("/")
    for folder in reversed(path.relative_to(root).parents[:-1]):
        here = root / folder
        if os.path.lexists(here) and not _is_dir(here):
            here.unlink()
        if not os.path.lexists(here):
            ensure_dir(here, 0o755)
    return path


def _write(root: Path, name: str, text: str, mode: int = 0o644) -> None:
    path = _place(root, name)
    remove_tree(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(fd, "w") as handle:
        os.fchmod(handle.fileno(), mode)
        handle.write(text)


def _read(path: Path) -> str:
    """The text of a regular file; nothing of anything else."""
    if not os.path.lexists(path) or not stat.S_ISREG(path.lstat().st_mode):
        return ""
    return path.read_text(errors="replace")


def _is_dir(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)
