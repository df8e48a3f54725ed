"""A stand-in for the program ``nixos-anywhere``, for the lab alone: no Nix, no kexec, no disk is formatted.

It takes the command lines of the real one (``installer_arguments``) and does over SSH what the real one does to a target,
phase by phase, with the same ``### … ###`` marks, through whatever ``ssh`` and ``ssh-copy-id`` stand first in PATH. Like
the real one it tries some things again for ever, keeps a copy of the private key in TMPDIR, and would format an installed
host without asking. What differs, because it cannot be had here:

* *kexec*: nothing is booted. A file system in memory lies over os-release, so that the Debian which runs says that it is
  the NixOS installer until it reboots; like the real installer it keeps addresses, host key and root's keys.
* *disko*: ``/mnt`` is emptied and mounted over itself. The lab boots what lies there after the next reboot, on top of its
  Debian base.
* *install*: extra-files exactly as the real one (tar, root:root, modes kept, ``chmod 755 /mnt``); the system closure is a
  Debian-based host profile laid out at the NixOS paths, made here from the fleet file the flake reference points to.
* *reboot*: after one second instead of six.

Where the real program is on PATH before the lab's folder, it is used instead.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

from clawdlets_ops import egress, hostfiles
from clawdlets_ops.errors import ClawdletsError, CommandError, LabError
from clawdlets_ops.fleet import load_fleet
from clawdlets_ops.lab.host_orchestrator import orchestrator_files
from clawdlets_ops.lab.host_tailnet import host_files
from clawdlets_ops.lab.installer_arguments import Abort, Arguments, parse_arguments
from clawdlets_ops.layout import EGRESS_DIR, Layout
from clawdlets_ops.process import Command, LocalRunner, Result, Runner
from clawdlets_ops.project import admin_keys

STEP_TIMEOUT_S = 300.0
POLL_S = 0.3
UPLOAD_AGAIN_S = 3.0
SHARED_PROGRAMS = ("clawdlets-egress",)  # of hostfiles/: NixOS has the very same
PROGRAMS = ("clawdlets-facts", "clawdlets-exposure", "clawdlets-activate", "clawdlets-sync")
SYSTEM_PROFILE = "nix/var/nix/profiles/system"

KEXEC = """\
set -eu
echo Downloading kexec tarball, this may take a moment...
folder=/run/clawdlets-lab-installer
mkdir -p $folder
printf 'ID=nixos\\nVARIANT_ID=installer\\nNAME="the lab stand-in of the NixOS installer"\\n' >$folder/os-release
mount --bind $folder/os-release /etc/os-release
echo machine will boot into nixos in 0s...
"""
DISKO = """\
set -eu
while umount -R /mnt 2>/dev/null; do :; done
mkdir -p /mnt
find /mnt -mindepth 1 -delete
chmod 755 /mnt
mount --bind /mnt /mnt
"""

UNITS = {
    "sops-install-secrets.service": """\
[Unit]
Description=Users and decrypted secrets (lab profile)
After=local-fs.target
Before=ssh.service tailscaled-autoconnect.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStartPre=-/nix/var/nix/profiles/system/sw/bin/clawdlets-sync settle
ExecStart=/nix/var/nix/profiles/system/sw/bin/clawdlets-activate
[Install]
WantedBy=multi-user.target
""",
    "clawdlets-firewall.service": """\
[Unit]
Description=Host firewall
DefaultDependencies=no
After=local-fs.target
Before=network-pre.target ssh.service
Wants=network-pre.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/nix/var/nix/profiles/system/sw/bin/clawdlets-exposure restore
[Install]
WantedBy=multi-user.target
""",
}
# Where Debian has the programs, and what a bot runs whose command is left to a NixOS configuration.
PATHS = {"nft": "/usr/sbin/nft", "squid": "/usr/sbin/squid", "left_open": "/bin/sleep infinity"}
# NixOS has made users before the first unit starts.
USERS_FIRST = """\
[Unit]
Before=sops-install-secrets.service
[Service]
ExecStartPre=/usr/bin/systemd-sysusers /etc/sysusers.d/clawdlets.conf
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the lab's ``nixos-anywhere``."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what it started is ended, its key removed
    words = list(sys.argv[1:] if argv is None else argv)
    lab_dir, words = Path(words[1]), words[2:]  # --lab-dir DIR, which the lab's wrapper puts first
    try:
        arguments = parse_arguments(words)
    except Abort as error:
        sys.stderr.write(f"aborted: {error}\n")
        return 1
    with tempfile.TemporaryDirectory(prefix="tmp.") as folder:
        try:
            install(LocalRunner(os.environ), arguments, lab_dir=lab_dir, folder=Path(folder))
        except CommandError as error:
            return error.exit_code or 1
        except ClawdletsError as error:
            sys.stderr.write(f"aborted: {error}\n")
            return 1
    return 0


def install(runner: Runner, arguments: Arguments, *, lab_dir: Path, folder: Path) -> None:
    """Do the phases to the target; ``folder`` takes the copy of the private key. CommandError, LabError."""
    remote = _Remote(runner, arguments, folder)
    root, host = parse_flake(arguments.flake)
    _mark("Uploading install SSH keys")
    remote.upload_key()
    installer = remote.gather_facts()
    if "kexec" in arguments.phases and not installer:
        _mark("Switching system into kexec")
        remote.run('mkdir -p "$HOME/kexec" && cat >"$HOME/kexec/nixos-anywhere-kexec.sh"', stdin=KEXEC.encode())
        remote.run('bash "$HOME/kexec/nixos-anywhere-kexec.sh"')
        if not remote.gather_facts():
            raise LabError("Failed to kexec into NixOS installer")
    if "disko" in arguments.phases:
        _mark("Formatting hard drive with disko")
        remote.run(DISKO)
    if "install" in arguments.phases:
        _mark("Uploading the system closure")
        remote.run(
            "mkdir -p /mnt && tar -C /mnt -xpf - --no-same-owner",
            stdin=profile_archive(Layout(root), host, lab_dir=lab_dir),
        )
        if arguments.extra_files:
            _mark("Copying extra files")
            remote.run("tar -C /mnt -xpf - --no-same-owner", stdin=extra_files_archive(Path(arguments.extra_files)))
            remote.run("chmod 755 /mnt")
        _mark("Installing NixOS")
        remote.run(f"ln -sfn {shlex.quote(system_path())} /mnt/{SYSTEM_PROFILE} && sync")
        _say("installation finished!")
    if "reboot" in arguments.phases:
        _mark("Rebooting")
        remote.run("nohup sh -c 'sleep 1; systemctl reboot' >/dev/null 2>&1 </dev/null &")
        _mark("Waiting for the machine to become unreachable due to reboot")
        while remote.run("exit 0", check=False).ok:
            time.sleep(POLL_S)
    _mark("Done!")


def parse_flake(flake: str) -> tuple[Path, str]:
    """Project root and host name of ``git+file:///path#host``; LabError for any other kind of reference."""
    reference, _, host = flake.partition("#")
    parts = urlsplit(reference)
    if parts.scheme != "git+file" or not parts.path or not host:
        raise LabError("the stand-in only knows git+file:///PROJECT#HOST", where=flake)
    return Path(parts.path), host


def profile_files(layout: Layout, host: str, *, lab_dir: Path) -> dict[str, tuple[int, bytes]]:
    """The host profile: path below the root → mode and content. Nothing secret: the payload brings that."""
    fleet = load_fleet(layout.fleet_file)
    declared = fleet.host(host)
    programs = _programs()
    profile = {"host": host}
    keys = admin_keys(layout, declared, home=str(Path.home()))
    files: dict[str, tuple[int, bytes]] = {
        "etc/hostname": (0o644, f"{host}\n".encode()),
        "etc/hosts": (0o644, f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {host}\n".encode()),
        "etc/os-release": (
            0o644,
            b'ID=nixos\nNAME=NixOS\nPRETTY_NAME="clawdlets lab host profile (Debian in the place of NixOS)"\n',
        ),
        "etc/ssh/sshd_config": (0o644, hostfiles.sshd_config().encode()),
        "etc/ssh/authorized_keys.d/admin": (
            0o644,
            "".join(f"{key}\n" for key in keys).encode(),
        ),
        "etc/sudoers.d/clawdlets": (0o440, hostfiles.text("sudoers").encode()),
        "etc/clawdlets/profile.json": (0o644, json.dumps(profile, indent=2).encode()),
        "etc/clawdlets/exposure-at-install": (
            0o644,
            b"public\n" if declared.ssh_exposure.mode == "public" else b"bootstrap\n",
        ),
    }
    for name, text in {**UNITS, **egress.units(declared, **PATHS)}.items():
        files[f"etc/systemd/system/{name}"] = (0o644, text.encode())
    files["etc/sysusers.d/clawdlets.conf"] = (
        0o644,
        "".join(f"u {user} - - -\n" for user in egress.service_users(declared)).encode(),
    )
    files[f"etc/systemd/system/{egress.RULES_UNIT}.d/users.conf"] = (0o644, USERS_FIRST.encode())
    for name, text in egress.etc_files(declared).items():
        files[f"{EGRESS_DIR.path.relative_to('/')}/{name}"] = (0o644, text.encode())
    store = _store_name(programs)
    for name, content in programs.items():
        files[f"nix/store/{store}/sw/bin/{name}"] = (0o555, content)
    if declared.tailnet.mode == "tailscale":
        files["etc/clawdlets/tailscale"] = (0o644, b"")
        files |= host_files(lab_dir, host, f"nix/store/{store}/sw/bin")
    files |= orchestrator_files(fleet, host, f"nix/store/{store}/sw/bin", personas=layout.personas_dir, keys=keys)
    return files


def profile_archive(layout: Layout, host: str, *, lab_dir: Path) -> bytes:
    """The host profile as a tar stream, with its units enabled."""
    files = profile_files(layout, host, lab_dir=lab_dir)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folders: set[str] = set()
        for path, (mode, content) in sorted(files.items()):
            for parent in reversed(Path(path).parents):
                if str(parent) not in (".", *folders):
                    folders.add(str(parent))
                    entry = tarfile.TarInfo(str(parent))
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(entry)
            entry = tarfile.TarInfo(path)
            entry.mode, entry.size = mode, len(content)
            archive.addfile(entry, io.BytesIO(content))
        for path in sorted(files):
            if path.startswith("etc/systemd/system/") and path.endswith((".service", ".socket")):
                name = Path(path).name
                wants = "etc/systemd/system/multi-user.target.wants"
                if wants not in folders:
                    folders.add(wants)
                    entry = tarfile.TarInfo(wants)
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(entry)
                _link(archive, f"{wants}/{name}", f"/etc/systemd/system/{name}")
        for folder in ("nix/var", "nix/var/nix", "nix/var/nix/profiles"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
    return buffer.getvalue()


def extra_files_archive(folder: Path) -> bytes:
    """The payload as ``tar -C folder -cpf- .`` makes it: modes as they are, links as links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, arcname=".", recursive=True, filter=_owned_by_root)
    return buffer.getvalue()


class _Remote:
    """Runs commands on the target through whatever ``ssh`` stands first in PATH, with the options of the real program."""

    def __init__(self, runner: Runner, arguments: Arguments, folder: Path) -> None:
        self._runner = runner
        self._identity = arguments.identity
        self._key = folder / "nixos-anywhere"
        self._options = ["-o", "IdentitiesOnly=yes", "-i", str(self._key)]
        self._options += ["-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no"]
        self._options += ["-p", arguments.port] if arguments.port else []
        self._options += [word for option in arguments.ssh_options for word in ("-o", option)]
        self._target = f"{arguments.user}@{arguments.address}"

    def upload_key(self) -> None:
        """Put our key among the target's; again and again until it is taken, as the real program does."""
        (Path.home() / ".ssh").mkdir(mode=0o700, parents=True, exist_ok=True)  # ssh-copy-id wants it
        if self._identity:
            self._key.write_bytes(b"")
            self._key.chmod(0o600)
            self._key.write_bytes(Path(self._identity).read_bytes())
            public = self._runner.run(Command(["ssh-keygen", "-y", "-f", self._key], "read the key")).check().stdout
            self._key.with_suffix(".pub").write_text(public)
        else:
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "nixos-anywhere", "-f", str(self._key)]
            self._runner.run(Command(argv, "make a key")).check()
        argv = ["ssh-copy-id", "-o", "IdentitiesOnly=no", "-o", "ConnectTimeout=10", *self._options, self._target]
        upload = Command(argv, "upload the key", timeout_s=STEP_TIMEOUT_S)
        while not self._runner.run(upload, on_line=_say).ok:
            time.sleep(UPLOAD_AGAIN_S)

    def gather_facts(self) -> bool:
        """Whether the installer runs there."""
        _mark("Gathering machine facts")
        said = self.run("cat /etc/os-release").stdout.replace('"', "").splitlines()
        return "ID=nixos" in said and "VARIANT_ID=installer" in said

    def run(self, command: str, *, stdin: bytes | None = None, check: bool = True) -> Result:
        argv = ["ssh", "-T", *self._options, "-o", "ConnectTimeout=10", self._target, command]
        result = self._runner.run(Command(argv, "reach the target", stdin=stdin, timeout_s=STEP_TIMEOUT_S))
        if check and not result.ok:
            # As the real program: the client's own words are on the log.
            sys.stdout.write(result.stderr)
            sys.stdout.flush()
            result.check()
        return result


def _store_name(programs: dict[str, bytes]) -> str:
    digest = hashlib.sha256(b"".join(programs[name] for name in sorted(programs))).hexdigest()
    return f"{digest[:32]}-clawdlets-lab-system"


def system_path() -> str:
    """The store path of the host profile's system."""
    return f"/nix/store/{_store_name(_programs())}"


def _programs() -> dict[str, bytes]:
    shipped = resources.files("clawdlets_ops.lab") / "profile"
    own = {name: (shipped / name).read_bytes() for name in PROGRAMS}
    return {**own, **{name: hostfiles.text(name).encode() for name in SHARED_PROGRAMS}}


def _link(archive: tarfile.TarFile, path: str, target: str) -> None:
    entry = tarfile.TarInfo(path)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    archive.addfile(entry)


def _owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def _mark(text: str) -> None:
    _say(f"### {text} ###")


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the real program's own words, on its standard output


if __name__ == "__main__":
    sys.exit(main())
