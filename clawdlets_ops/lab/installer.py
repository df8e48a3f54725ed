"""A stand-in for the program ``nixos-anywhere``, for the lab alone: no Nix, no kexec, no disk is formatted.

It takes the arguments that we give the real one and does over SSH what the real one does to a target, phase by phase, with
the same ``### … ###`` marks. What differs, because it cannot be had here:

* *kexec*: nothing is booted. The running Debian is marked ``VARIANT_ID=installer``; like the real installer it keeps
  addresses, host key and root's keys.
* *disko*: ``/mnt`` is emptied. The lab boots what lies there after the next reboot, on top of its Debian base.
* *install*: extra-files exactly as the real one (tar, root:root, modes kept, ``chmod 755 /mnt``); the system closure is a
  Debian-based host profile laid out at the NixOS paths, made here from the fleet file the flake reference points to.
* *reboot*: as the real one.

Where the real program is on PATH before the lab's folder, it is used instead.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shlex
import sys
import tarfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from clawdlets_ops.errors import ClawdletsError, LabError
from clawdlets_ops.fleet import load_fleet
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, LocalRunner, Result, Runner
from clawdlets_ops.project import admin_keys

STEP_TIMEOUT_S = 300.0
GOES_DOWN_WITHIN_S = 60.0
PROGRAMS = ("clawdlets-facts", "clawdlets-exposure", "clawdlets-activate", "clawdlets-join")
SYSTEM_PROFILE = "nix/var/nix/profiles/system"

UNITS = {
    "sops-install-secrets.service": """\
[Unit]
Description=Users and decrypted secrets (lab profile)
After=local-fs.target
Before=ssh.service tailscaled-autoconnect.service
[Service]
Type=oneshot
RemainAfterExit=yes
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
    "tailscaled-autoconnect.service": """\
[Unit]
Description=Join the lab's tailnet
After=sops-install-secrets.service network.target
Requires=sops-install-secrets.service
StartLimitIntervalSec=0
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/nix/var/nix/profiles/system/sw/bin/clawdlets-join
Restart=on-failure
RestartSec=5
[Install]
WantedBy=multi-user.target
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the lab's ``nixos-anywhere``."""
    parser = argparse.ArgumentParser(prog="nixos-anywhere (lab stand-in)")
    parser.add_argument("--lab-dir", type=Path, required=True)
    parser.add_argument("--flake", required=True)
    parser.add_argument("--target-host", required=True)
    parser.add_argument("-i", dest="identity", required=True)
    parser.add_argument("--extra-files", type=Path)
    parser.add_argument("--phases", default="kexec,disko,install,reboot")
    arguments = parser.parse_args(argv)
    try:
        install(
            LocalRunner(os.environ),
            lab_dir=arguments.lab_dir,
            flake=arguments.flake,
            target=arguments.target_host,
            identity=arguments.identity,
            extra_files=arguments.extra_files,
            phases=tuple(phase for phase in arguments.phases.split(",") if phase),
        )
    except ClawdletsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def install(
    runner: Runner,
    *,
    lab_dir: Path,
    flake: str,
    target: str,
    identity: str,
    extra_files: Path | None,
    phases: tuple[str, ...],
) -> None:
    """Do ``phases`` to ``target`` (root@address)."""
    remote = _Remote(runner, target, identity)
    root, host = parse_flake(flake)
    if unknown := set(phases) - {"kexec", "disko", "install", "reboot"}:
        raise LabError(f"unknown phases: {', '.join(sorted(unknown))}")
    _mark("Gathering machine facts")
    installer = remote.run("grep -q '^VARIANT_ID=installer' /etc/os-release", check=False).ok
    if "kexec" in phases and not installer:
        _mark("Switching system into kexec")
        # Debian's /etc/os-release is a link into /usr: a file of its own takes its place, whole.
        remote.run(
            "cp /usr/lib/os-release /etc/.os-release && echo VARIANT_ID=installer >>/etc/.os-release"
            " && mv /etc/.os-release /etc/os-release"
        )
        installer = True
    if set(phases) - {"kexec"} and not installer:
        raise LabError("the target is not an installer", where=target, fix="run the kexec phase first")
    if "disko" in phases:
        _mark("Formatting hard drive with disko")
        remote.run("rm -rf /mnt/.[!.]* /mnt/* && mkdir -p /mnt/etc && chmod 755 /mnt")
    if "install" in phases:
        _mark("Uploading the system closure")
        remote.run(
            "mkdir -p /mnt && tar -C /mnt -xpf - --no-same-owner",
            stdin=profile_archive(Layout(root), host, control=_tailnet_control(lab_dir)),
        )
        if extra_files is not None:
            _mark("Copying extra files")
            remote.run("tar -C /mnt -xpf - --no-same-owner && chmod 755 /mnt", stdin=extra_files_archive(extra_files))
        _mark("Installing NixOS")
        remote.run(f"ln -sfn {shlex.quote(_store_path())} /mnt/{SYSTEM_PROFILE} && sync")
        print("installation finished!", flush=True)  # noqa: T201 - the real program's own words, on its standard output
    if "reboot" in phases:
        _mark("Rebooting")
        remote.run("nohup sh -c 'sleep 1; systemctl reboot' >/dev/null 2>&1 </dev/null &")
        _mark("Waiting for the machine to become unreachable due to reboot")
        gone = Retrying(
            stop=stop_after_delay(GOES_DOWN_WITHIN_S),
            wait=wait_fixed(0.3),
            retry=retry_if_result(lambda up: up),
            retry_error_callback=lambda _: True,
        )(lambda: remote.run("exit 0", check=False).ok)
        if gone:
            raise LabError(f"the machine did not go down within {GOES_DOWN_WITHIN_S:g} s", where=target)
    _mark("Done!")


def parse_flake(flake: str) -> tuple[Path, str]:
    """Project root and host name of ``git+file:///path#host``; LabError for any other kind of reference."""
    reference, _, host = flake.partition("#")
    parts = urlsplit(reference)
    if parts.scheme != "git+file" or not parts.path or not host:
        raise LabError("the stand-in only knows git+file:///PROJECT#HOST", where=flake)
    return Path(parts.path), host


def profile_files(layout: Layout, host: str, *, control: str) -> dict[str, tuple[int, bytes]]:
    """The host profile: path below the root → mode and content. Nothing secret: the payload brings that."""
    fleet = load_fleet(layout.fleet_file)
    declared = fleet.host(host)
    shipped = resources.files("clawdlets_ops.lab") / "profile"
    programs = {name: (shipped / name).read_bytes() for name in PROGRAMS}
    profile = {"host": host, "tailnetControl": control}
    files: dict[str, tuple[int, bytes]] = {
        "etc/hostname": (0o644, f"{host}\n".encode()),
        "etc/hosts": (0o644, f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {host}\n".encode()),
        "etc/os-release": (
            0o644,
            b'ID=nixos\nNAME=NixOS\nPRETTY_NAME="clawdlets lab host profile (Debian in the place of NixOS)"\n',
        ),
        "etc/ssh/sshd_config": (0o644, (shipped / "sshd_config").read_bytes()),
        "etc/ssh/authorized_keys.d/admin": (
            0o644,
            "".join(f"{key}\n" for key in admin_keys(layout, declared, home=str(Path.home()))).encode(),
        ),
        "etc/sudoers.d/clawdlets": (0o440, (shipped / "sudoers").read_bytes()),
        "etc/clawdlets/profile.json": (0o644, json.dumps(profile, indent=2).encode()),
        "etc/clawdlets/egress": (0o644, f"{declared.egress.mode}\n".encode()),
        "etc/clawdlets/exposure-at-install": (
            0o644,
            b"public\n" if declared.ssh_exposure.mode == "public" else b"bootstrap\n",
        ),
    }
    units = dict(UNITS)
    if declared.tailnet.mode == "tailscale":
        files["etc/clawdlets/tailscale"] = (0o644, b"")
    else:
        del units["tailscaled-autoconnect.service"]
    for name, text in units.items():
        files[f"etc/systemd/system/{name}"] = (0o644, text.encode())
    store = _store_name(programs)
    for name, content in programs.items():
        files[f"nix/store/{store}/sw/bin/{name}"] = (0o555, content)
    return files


def profile_archive(layout: Layout, host: str, *, control: str) -> bytes:
    """The host profile as a tar stream, with its units enabled."""
    files = profile_files(layout, host, control=control)
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
            if path.startswith("etc/systemd/system/") and path.endswith(".service"):
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
    """Runs commands on the target through whatever ``ssh`` stands first in PATH."""

    def __init__(self, runner: Runner, target: str, identity: str) -> None:
        self._runner = runner
        self._argv = ["ssh", "-i", identity, "-o", "ConnectTimeout=5", target.replace("[", "").replace("]", "")]

    def run(self, command: str, *, stdin: bytes | None = None, check: bool = True) -> Result:
        result = self._runner.run(
            Command([*self._argv, command], "reach the target", stdin=stdin, timeout_s=STEP_TIMEOUT_S)
        )
        if check and not result.ok:
            # As the real program: the client's own words are on the log.
            sys.stdout.write(result.stderr)
            sys.stdout.flush()
            result.check()
        return result


def _tailnet_control(lab_dir: Path) -> str:
    return str(json.loads((lab_dir / "lab.json").read_text())["tailnetControl"])


def _store_name(programs: dict[str, bytes]) -> str:
    digest = hashlib.sha256(b"".join(programs[name] for name in sorted(programs))).hexdigest()
    return f"{digest[:32]}-clawdlets-lab-system"


def _store_path() -> str:
    shipped = resources.files("clawdlets_ops.lab") / "profile"
    return f"/nix/store/{_store_name({name: (shipped / name).read_bytes() for name in PROGRAMS})}"


def _link(archive: tarfile.TarFile, path: str, target: str) -> None:
    entry = tarfile.TarInfo(path)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    archive.addfile(entry)


def _owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def _mark(text: str) -> None:
    print(f"### {text} ###", flush=True)  # noqa: T201 - the real program's marks, on its standard output


if __name__ == "__main__":
    sys.exit(main())
