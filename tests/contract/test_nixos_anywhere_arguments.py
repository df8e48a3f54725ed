"""The lab's stand-in for nixos-anywhere makes of a command line what the real program makes of it.

``nixos_anywhere_cases.json`` holds command lines and their effect, recorded from the real script (1.13.0) with stand-ins for
ssh, ssh-copy-id, nix and sleep on PATH: exit status, marks, whom it logged in as, and with which options. The stand-in must
have the same effect; so must the real program, where one is on PATH. Record anew:
``python tests/contract/test_nixos_anywhere_arguments.py /path/to/nixos-anywhere``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.lab.installer_arguments import Abort, parse_arguments

pytestmark = [pytest.mark.contract, pytest.mark.timeout(120)]
CASES = Path(__file__).with_name("nixos_anywhere_cases.json")

# What is asked: a name, the state of the target at the start, and the words. FLAKE, KEY and EXTRA stand for paths.
ASKED: list[tuple[str, str, list[str]]] = [
    *(
        (f"our {phase} phase", "debian" if phase == "kexec" else "installer",
         ["--flake", "FLAKE#alpha", "--target-host", "root@198.51.100.7", "-i", "KEY", "--extra-files", "EXTRA", "--phases", phase])
        for phase in ("kexec", "disko", "install", "reboot")
    ),
    ("our preflight", "debian",
     ["--flake", "FLAKE#alpha", "--target-host", "root@198.51.100.7", "-i", "KEY", "--extra-files", "EXTRA",
      "--build-on", "local", "--no-use-machine-substituters", "--phases", ""]),
    ("all phases, host by position", "debian", ["--flake", "FLAKE#alpha", "-i", "KEY", "root@198.51.100.7"]),
    ("the installer needs no kexec", "installer", ["-f", "FLAKE#alpha", "-i", "KEY", "--phases", "kexec", "root@198.51.100.7"]),
    ("phases in another order", "installer", ["-f", "FLAKE#alpha", "-i", "KEY", "--phases", "install,disko", "root@198.51.100.7"]),
    ("a comma at the end", "installer", ["-f", "FLAKE#alpha", "-i", "KEY", "--phases", "disko,", "root@198.51.100.7"]),
    ("no kexec phase: always root", "installer", ["-f", "FLAKE#alpha", "-i", "KEY", "--phases", "disko", "bob@198.51.100.7"]),
    ("a port and options", "installer",
     ["-f", "FLAKE#alpha", "-i", "KEY", "-p", "2222", "--ssh-option", "LogLevel=ERROR", "--ssh-option", "Compression=yes",
      "--phases", "disko", "root@198.51.100.7"]),
    ("a long port", "installer", ["-f", "FLAKE#alpha", "-i", "KEY", "--ssh-port", "2223", "--phases", "", "root@198.51.100.7"]),
    ("no key given", "installer", ["-f", "FLAKE#alpha", "--phases", "", "root@198.51.100.7"]),
    ("without reboot", "installer", ["-f", "FLAKE#alpha", "-i", "KEY", "--no-reboot", "root@198.51.100.7"]),
    ("stop after disko", "installer", ["-f", "FLAKE#alpha", "-i", "KEY", "--stop-after-disko", "root@198.51.100.7"]),
    ("what builds otherwise and does the same", "installer",
     ["-f", "FLAKE#alpha", "-i", "KEY", "--no-disko-deps", "--disko-mode", "mount", "--option", "cores", "2", "--show-trace",
      "-L", "--no-substitute-on-destination", "--ssh-store-setting", "compress", "true", "--phases", "disko", "root@198.51.100.7"]),
    ("an unknown phase", "debian", ["-f", "FLAKE#alpha", "--phases", "format", "root@198.51.100.7"]),
    ("no host", "debian", ["-f", "FLAKE#alpha", "-i", "KEY"]),
    ("two hosts", "debian", ["-f", "FLAKE#alpha", "root@198.51.100.7", "root@198.51.100.8"]),
    ("no flake", "debian", ["-i", "KEY", "root@198.51.100.7"]),
    ("a flake without attribute", "debian", ["-f", "FLAKE", "root@198.51.100.7"]),
    ("an unknown place to build", "debian", ["-f", "FLAKE#alpha", "--build-on", "moon", "root@198.51.100.7"]),
    ("an unknown disko mode", "debian", ["-f", "FLAKE#alpha", "--disko-mode", "melt", "root@198.51.100.7"]),
]  # fmt: skip

# A stand-in for ssh: writes down what it is called with, and answers as a target in the given state would.
SSH = """#!/bin/sh
{ printf '%s\\037' "$@"; printf '\\n'; } >>"$BENCH/calls"
state=$(cat "$BENCH/state")
case "$*" in
  *" -G "*) for last; do :; done; case $last in *@*) echo "user ${last%@*}" ;; *) echo "user root" ;; esac; exit 0 ;;
  *"exit 0"*)
    case $state in
      going) echo installer >"$BENCH/state"; exit 255 ;;
      gone) exit 255 ;;
    esac
    exit 0 ;;
  *" enableDebug= sh --"*)
    cat >/dev/null
    installer=n; [ "$state" = debian ] || installer=y
    for fact in isOs=Linux isArch=x86_64 isNixos=$installer isInstaller=$installer isContainer=none isRoot=y hasIpv6Only=n \\
      hasTar=y hasCpio=y hasSudo=y hasDoas=n hasWget=y hasCurl=y hasSetsid=y hasNixOSFacter=n; do echo $fact; done
    exit 0 ;;
  *"cat /etc/os-release"*)
    if [ "$state" = debian ]; then echo ID=debian; else printf 'ID=nixos\\nVARIANT_ID=installer\\n'; fi
    exit 0 ;;
  *"bash \\"\\$HOME/kexec/nixos-anywhere-kexec.sh\\""*) echo $KEXEC_LEAVES >"$BENCH/state"; exit 0 ;;
  *"systemctl reboot"*) echo gone >"$BENCH/state"; exit 0 ;;
esac
said=$(cat 2>/dev/null | tr -d '\\0' | head -c 4000)
case "$said" in *"sleep 6 && reboot"*) echo gone >"$BENCH/state" ;; esac
exit 0
"""
COPY_ID = """#!/bin/sh
{ printf 'ssh-copy-id\\037'; printf '%s\\037' "$@"; printf '\\n'; } >>"$BENCH/calls"
"""
NIX = """#!/bin/sh
case "$*" in
  *"config show system"*) echo x86_64-linux ;;
  *"eval --raw"*) echo x86_64-linux ;;
  "build "* | *" build "*) echo /nix/store/00000000000000000000000000000000-canary ;;
esac
"""
OWN_OPTIONS = re.compile(r"IdentitiesOnly|UserKnownHostsFile|StrictHostKeyChecking|ConnectTimeout")


def effect(program: list[str], state: str, words: list[str], folder: Path, *, real: bool) -> dict[str, Any]:
    """What ``program`` does with ``words`` against the stand-in of a target."""
    bin_dir = folder / "bin"
    bin_dir.mkdir(parents=True)
    for name, text in {"ssh": SSH, "ssh-copy-id": COPY_ID, "nix": NIX, "sleep": "#!/bin/sh\nexit 0\n"}.items():
        leaves = "going" if real else "installer"  # the stand-in's kexec does not take the machine down
        (bin_dir / name).write_text(text.replace("$BENCH", str(folder)).replace("$KEXEC_LEAVES", leaves))
        (bin_dir / name).chmod(0o755)
    project = folder / "project"
    (project / "fleet").mkdir(parents=True)
    host = {
        "provisioning": {
            "adminCidrs": ["203.0.113.0/24"],
            "sshPubkeyFile": ".clawdlets/keys/operators/ssh_ed25519.pub",
        },
        "sshExposure": {"mode": "public"},
        "tailnet": {"mode": "none"},
    }
    (project / "fleet" / "clawdlets.json").write_text(json.dumps({"schemaVersion": 1, "hosts": {"alpha": host}}))
    key = project / ".clawdlets/keys/operators/ssh_ed25519"
    key.parent.mkdir(parents=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    (folder / "extra" / "etc").mkdir(parents=True)
    (folder / "lab").mkdir()
    (folder / "home").mkdir()
    (folder / "state").write_text(f"{state}\n")
    (folder / "calls").touch()
    places = {
        "FLAKE#alpha": f"git+file://{project}#alpha",
        "FLAKE": f"git+file://{project}",
        "KEY": str(key),
        "EXTRA": str(folder / "extra"),
    }
    env = {
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder),
    }
    done = subprocess.run(
        [*program, *(places.get(word, word) for word in words)],
        env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
    )  # fmt: skip
    calls = [line.split("\x1f")[:-1] for line in (folder / "calls").read_text().splitlines()]
    calls = [call for call in calls if "-G" not in call]
    options = {call[at + 1] for call in calls for at, word in enumerate(call[:-1]) if word == "-o"}
    return {
        "exit": done.returncode,
        "marks": re.findall(r"^### (.*) ###$", done.stdout, flags=re.MULTILINE),
        "logsInAs": sorted({word for call in calls for word in call if re.fullmatch(r"[a-z]+@[0-9.]+", word)}),
        "ports": sorted({call[at + 1] for call in calls for at, word in enumerate(call[:-1]) if word == "-p"}),
        "options": sorted(option for option in options if not OWN_OPTIONS.match(option)),
        "uploadsKey": any(call[0] == "ssh-copy-id" for call in calls),
        "saysInstalled": "installation finished!" in done.stdout if not real else None,
    }


def comparable(found: dict[str, Any]) -> dict[str, Any]:
    """nixos-install itself, which says so, is played by nobody in the recording."""
    return {name: value for name, value in found.items() if name != "saysInstalled"}


def recorded() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(CASES.read_text())["cases"]
    return found


@pytest.mark.parametrize("case", recorded() if CASES.exists() else [], ids=lambda case: case["name"].replace(" ", "-"))
def test_the_stand_in_does_what_the_real_program_did(case: dict[str, Any], tmp_path: Path) -> None:
    program = [sys.executable, "-m", "clawdlets_ops.lab.installer", "--lab-dir", str(tmp_path / "bench" / "lab")]
    found = effect(program, case["state"], case["words"], tmp_path / "bench", real=False)
    assert comparable(found) == comparable(case["effect"])
    assert found["saysInstalled"] is ("Installing NixOS" in found["marks"])


def real_program() -> str | None:
    """The real nixos-anywhere on PATH, if there is one; the lab's stand-in is none."""
    found = shutil.which("nixos-anywhere")
    return found if found and b"clawdlets_ops.lab" not in Path(found).read_bytes() else None


@pytest.mark.skipif(real_program() is None, reason="the real nixos-anywhere is not on PATH")
@pytest.mark.parametrize("case", recorded() if CASES.exists() else [], ids=lambda case: case["name"].replace(" ", "-"))
def test_the_real_program_does_what_was_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    found = effect([str(real_program())], case["state"], case["words"], tmp_path / "bench", real=True)
    assert found == case["effect"]


def test_the_cases_are_those_that_are_asked() -> None:
    assert [(case["name"], case["state"], case["words"]) for case in recorded()] == ASKED


def test_what_the_stand_in_cannot_play_it_refuses() -> None:
    for words in (["--vm-test"], ["--store-paths", "/a", "/b"], ["--force-kexec"], ["--chown", "/a", "0:0"]):
        with pytest.raises(Abort, match="does not play"):
            parse_arguments([*words, "-f", "x#alpha", "root@198.51.100.7"])


def record(program: str) -> None:
    cases = []
    for name, state, words in ASKED:
        with tempfile.TemporaryDirectory() as folder:
            found = effect([program], state, words, Path(folder) / "bench", real=True)
        cases.append({"name": name, "state": state, "words": words, "effect": found})
    text = json.dumps({"recordedFrom": "nixos-anywhere 1.13.0", "cases": cases}, indent=1)
    CASES.write_text(text + "\n")


if __name__ == "__main__":
    record(sys.argv[1])
