"""What a login to the target shows and does, between the phases: how it stands, whose turn it is, what was laid down."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from clawdlets_ops import nixos_anywhere, ssh
from clawdlets_ops.errors import BusyError, InstallRefused
from clawdlets_ops.fleet import Host
from clawdlets_ops.install.gates import Target, is_installer
from clawdlets_ops.layout import INSTALL_MARKER, INSTALL_RECEIPT
from clawdlets_ops.secrets.payload import Manifest

MOUNT = "/mnt"
LEASE = f"{nixos_anywhere.DONE_DIR}/lease"
UNMOUNT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Standing:
    """How the target stands. ``done``: the phases that came to their end in the installer that runs now."""

    facts: Target
    mounted: bool
    laid: bool
    done: frozenset[str]

    @property
    def phases(self) -> tuple[str, ...]:
        """What is still to be done."""
        return resume_phases(self.facts.os_release, mounted=self.mounted, system_laid=self.laid, done=self.done)


def resume_phases(
    os_release: str, *, mounted: bool, system_laid: bool, done: frozenset[str] = frozenset({"disko", "install"})
) -> tuple[str, ...]:
    """The phases still to do, from how the target stands; pure.

    Debian → kexec; installer with nothing mounted → disko; mounted → install; system profile there → reboot. A phase
    that did not come to its end (``done``) left the same traces: half a formatting may have mounted the root and not the
    boot partition, and nixos-install sets the profile before it writes the boot loader. It is done again.
    """
    if not is_installer(os_release):
        return nixos_anywhere.PHASES
    if not mounted or "disko" not in done:
        return ("disko", "install", "reboot")
    return ("reboot",) if system_laid and "install" in done else ("install", "reboot")


def read_standing(shell: ssh.Session, declared: Host) -> Standing:
    """Look at the target; an answer that does not come leaves its field empty, and a gate then refuses."""

    def said(command: str) -> str:
        answer = shell.run(command)
        return answer.stdout.strip() if answer.ok else ""

    memory = said("awk '$1 == \"MemTotal:\" { print $2 }' /proc/meminfo")
    facts = Target(
        machine=said("uname -m"),
        os_release=said("cat /etc/os-release"),
        memory_bytes=int(memory) * 1024 if memory.isdigit() else None,
        block_devices=said("lsblk --json --bytes --output PATH,TYPE,SIZE,RO,PARTLABEL"),
        device=said(f"readlink -f {shlex.quote(declared.disk_device)}"),
        marker=said(f"cat {INSTALL_MARKER.path} 2>/dev/null || cat {MOUNT}/*{INSTALL_MARKER.path}"),
    )
    return Standing(
        facts,
        mounted=shell.run(f"findmnt --noheadings --mountpoint {MOUNT}").ok,
        laid=shell.run(f"test -L {MOUNT}/nix/var/nix/profiles/system").ok,
        done=frozenset(said(f"ls {nixos_anywhere.DONE_DIR}").split()),
    )


def take_lease(shell: ssh.Session, host: str, ours: str) -> None:
    """Write ourselves down on the target as the one who installs it; BusyError when somebody else has."""
    holder = shell.check(
        f"mkdir -p {nixos_anywhere.DONE_DIR}; (set -C; printf '%s\\n' {shlex.quote(ours)} >{LEASE}) 2>/dev/null; cat {LEASE}"
    ).strip()
    if holder != ours:
        raise BusyError(
            f"is being installed by {nixos_anywhere.printable(holder)}",
            where=host,
            fix=f"wait for them; if that run is dead for good, remove {LEASE} on the server (it goes with a reboot), "
            "and run again",
        )


def clear_mounts(shell: ssh.Session, host: str) -> None:
    """Unmount what a formatting that was cut short left; InstallRefused when it cannot be."""
    shell.run("pkill -x nix-store; pkill -x nix-daemon")
    answer = shell.run(f"umount -R {MOUNT}", timeout_s=UNMOUNT_TIMEOUT_S)
    if not answer.ok and shell.run(f"findmnt --noheadings --mountpoint {MOUNT}").ok:
        raise InstallRefused(
            f"has {MOUNT} mounted and in use: {nixos_anywhere.printable(answer.stderr.strip())}",
            where=host,
            fix="reset the server (hcloud server reset) and run again: it begins at kexec",
        )


def check_laid(shell: ssh.Session, host: str, shipped: Manifest) -> None:
    """InstallRefused unless every entry of the payload lies below the new root with its mode, and is root's."""
    wanted = {f"{MOUNT}/{entry.path}".removesuffix("/."): f"{entry.mode:o} 0 0" for entry in shipped.entries}
    said = shell.run(f"stat --format '%a %u %g %n' -- {shlex.join(wanted)}").stdout.splitlines()
    found = {name: f"{mode} {uid} {gid}" for mode, uid, gid, name in (line.split(" ", 3) for line in said if line)}
    if wrong := [f"{path}: {found.get(path, 'not there')}" for path in wanted if found.get(path) != wanted[path]]:
        raise InstallRefused(
            "has not the payload that was shipped (mode, user, group):\n  " + "\n  ".join(wrong[:10]),
            where=host,
            fix="run again: the install phase lays it anew",
        )


def write_receipt(shell: ssh.Session, text: str) -> None:
    """Lay the receipt below the new root, whole or not at all."""
    path = f"{MOUNT}{INSTALL_RECEIPT.path}"
    answer = shell.run(
        f"umask 022; cat >{path}.new && chmod {INSTALL_RECEIPT.mode:o} {path}.new && mv {path}.new {path} && sync",
        stdin=text,
    )
    if not answer.ok:
        raise InstallRefused(f"did not take the receipt: {answer.stderr.strip()}", fix="run again")
