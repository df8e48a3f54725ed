"""What the real ``nixos-anywhere`` needs to install a lab machine: a stand-in for ``nix``, and one for what kexec boots.

Both are in ``.clawdlets/lab/real``, which is on nobody's PATH by itself; docs/howto/install.md says how to use them. As
``nix``, this module answers what the script asks: it builds nothing, and what it *copies* is the lab's host profile, a
disko script that empties ``/mnt``, and a ``nixos-install`` that sets the system profile.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import shlex
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from clawdlets_ops.errors import ClawdletsError, LabError
from clawdlets_ops.files import ensure_dir, write_atomic
from clawdlets_ops.fleet import load_fleet
from clawdlets_ops.lab.installer import DISKO, KEXEC, SYSTEM_PROFILE, parse_flake, profile_archive, system_path
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, LocalRunner, Runner

KEXEC_TARBALL: Final = "kexec.tar.gz"
COPY_TIMEOUT_S: Final = 300.0

# The machine must be unreachable for a moment: that is what the script waits for before it waits for the installer.
_RUN: Final = f"""\
#!/bin/sh
{KEXEC}
setsid sh -c 'sleep 1; systemctl stop ssh; pkill -x sshd; sleep 8; systemctl start ssh' >/dev/null 2>&1 </dev/null &
"""
_NIXOS_INSTALL: Final = f"""\
#!/bin/sh
set -eu
while [ "$1" != --system ]; do shift; done
mkdir -p /mnt/nix/var/nix/profiles
ln -sfn "$2" /mnt/{SYSTEM_PROFILE}
sync
echo installation finished!
"""
# Debian's minimal system lacks cpio, which the script asks for and never calls.
_PLACE: Final = """\
set -eu
mkdir -p /nix/store
cat >{path}
chmod 555 {path}
"""


def write(folder: Path, program: str) -> None:
    """Fill ``.clawdlets/lab/real``: ``nix``, which is ``program`` (a shell script's text), and the kexec tarball."""
    ensure_dir(folder, 0o755)
    write_atomic(folder / "nix", program, mode=0o755)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("kexec/run")
        entry.mode, entry.size = 0o755, len(_RUN)
        archive.addfile(entry, io.BytesIO(_RUN.encode()))
    write_atomic(folder / KEXEC_TARBALL, buffer.getvalue(), mode=0o644)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the lab's ``nix``."""
    words = list(sys.argv[1:] if argv is None else argv)
    lab_dir, words = Path(words[1]), words[2:]  # --lab-dir DIR, which the lab's wrapper puts first
    try:
        sys.stdout.write(answer(words, lab_dir=lab_dir, runner=LocalRunner(os.environ), environ=os.environ))
    except ClawdletsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def answer(words: list[str], *, lab_dir: Path, runner: Runner, environ: Mapping[str, str]) -> str:
    """What ``nix`` prints for this command line; LabError for one that is not the script's or ours."""
    flakes = [word for word in words if word.startswith("git+file://")]
    said = " ".join(words)
    if words == ["--version"]:
        return "nix (a stand-in, for the lab)\n"
    if "config show" in said:
        return "" if words[-1] == "extra-platforms" else f"{platform.machine()}-linux\n"
    if "eval" in words and flakes:
        return _evaluated(flakes[0], said)
    if "build" in words and flakes:
        root, host = _flake(flakes[0])
        kind = "system" if flakes[0].endswith(".system.build.toplevel") else "disko"
        return f"{system_path() if kind == 'system' else _disko_path(root, host)}\n"
    if "copy" in words and "--to" in words:
        _copy(words[-1], words[words.index("--to") + 1], lab_dir, runner, environ)
        return ""
    raise LabError("the lab's nix only knows what nixos-anywhere asks", where=f"nix {said}")


def _evaluated(flake: str, said: str) -> str:
    root, host = _flake(flake)
    fleet = load_fleet(Layout(root).fleet_file)
    if "builtins.attrNames" in said:
        return f"[{', '.join(f'{chr(34)}{name}{chr(34)}' for name in fleet.hosts)}]\n"
    return f"{fleet.host(host).system}" if "--raw" in said else '""\n'


def _flake(reference: str) -> tuple[Path, str]:
    """Project and host of ``git+file:///p#nixosConfigurations."alpha".config…``; the host is empty when none is named."""
    path, _, attribute = reference.partition("#")
    named = re.match(r'nixosConfigurations\."?([^."]+)', attribute)
    root, _ = parse_flake(f"{path}#x")
    return root, named[1] if named else ""


def _disko_path(root: Path, host: str) -> str:
    digest = hashlib.sha256(f"{root}#{host}".encode()).hexdigest()[:32]
    return f"/nix/store/{digest}-{host}-disko"


def _copy(path: str, store: str, lab_dir: Path, runner: Runner, environ: Mapping[str, str]) -> None:
    """Bring what ``path`` stands for to the target, through the script's own ssh."""
    target = urlsplit(store).netloc

    def remote(command: str, stdin: bytes) -> None:
        argv = ["ssh", *shlex.split(environ.get("NIX_SSHOPTS", "")), target, command]
        runner.run(Command(argv, "copy to the target", stdin=stdin, timeout_s=COPY_TIMEOUT_S)).check()

    if path.endswith("-disko"):
        remote(_PLACE.format(path=shlex.quote(path)), b"#!/bin/sh\n" + DISKO.encode())
        remote(_PLACE.format(path="/usr/local/bin/nixos-install"), _NIXOS_INSTALL.encode())
        return
    host = _host_at(target, lab_dir)
    remote("tar -C /mnt -xpf - --no-same-owner", profile_archive(Layout(lab_dir.parent.parent), host, lab_dir=lab_dir))


def _host_at(target: str, lab_dir: Path) -> str:
    """The host whose installation goes to ``target``: its known_hosts names that address."""
    address = target.rpartition("@")[2].strip("[]")
    for file in (lab_dir.parent / "install").glob("*/known_hosts"):
        if any(line.split()[0] == address for line in file.read_text().splitlines()):
            return file.parent.name
    raise LabError("no installation of this project goes there", where=target)


if __name__ == "__main__":
    sys.exit(main())
