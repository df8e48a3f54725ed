"""``clawdlets-exposure`` in namespaces of its own, on a machine whose systemd cannot be asked: what was begun is taken back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from clawdlets_ops.process import Command, LocalRunner

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "clawdlets_ops" / "lab" / "profile" / "clawdlets-exposure"
OWNER = "0123456789abcdef"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces"),
    pytest.mark.skipif(
        any(shutil.which(name) is None for name in ("unshare", "nft", "flock")), reason="needs unshare, nft and flock"
    ),
]

WORLD = r"""
set -eu
program=$1 owner=$2
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t tmpfs -o mode=0755 tmpfs /var/lib
mkdir -p /var/lib/clawdlets
echo bootstrap >/var/lib/clawdlets/exposure
sh "$program" restore
say() {
  echo "$1 status=$2 mode=$(cat /run/clawdlets/exposure) trial=$([ -e /run/clawdlets/exposure-trial ] && echo yes || echo no)" \
    "open=$(nft list table inet clawdlets | grep -c '^[[:space:]]*tcp dport 22 accept' || true)"
}
"""


def told(tmp_path: Path, script: str, *, wait_s: int = 30) -> dict[str, str]:
    """What ``say`` printed in a world where the host is kept in mode bootstrap: its first word → the rest."""
    text = PROGRAM.read_text()
    assert text.count("flock -w 30 9") == 1
    program = tmp_path / "clawdlets-exposure"
    program.write_text(text.replace("flock -w 30 9", f"flock -w {wait_s} 9"))
    words = ["unshare", "--mount", "--net", "sh", "-c", WORLD + script, "world", program, OWNER]
    runner = LocalRunner({"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    printed = runner.run(Command(words, "try the program", timeout_s=60)).check().stdout
    return dict(line.split(" ", 1) for line in printed.splitlines())


def test_a_trial_whose_timer_cannot_be_set_is_no_trial(tmp_path: Path) -> None:
    script = """
      say before 0
      # An earlier trial of the same owner stands.
      echo "$owner tailnet 99999999" >/run/clawdlets/exposure-trial
      sh "$program" put
      say standing 0
      status=0
      sh "$program" try tailnet 60 "$owner" || status=$?
      say after "$status"
    """
    found = told(tmp_path, script)
    assert found["before"] == "status=0 mode=bootstrap trial=no open=1"
    assert found["standing"] == "status=0 mode=tailnet trial=yes open=0"
    assert found["after"] == "status=70 mode=bootstrap trial=no open=1"


def test_the_timer_waits_for_whoever_is_at_it_longer_than_a_command_does(tmp_path: Path) -> None:
    script = """
      echo "$owner tailnet 99999999" >/run/clawdlets/exposure-trial
      sh "$program" put
      exec 8>/run/clawdlets/exposure.lock
      flock 8
      sh "$program" expire 8>&- &
      timer=$!
      status=0
      sh "$program" revert "$owner" 8>&- || status=$?
      say command "$status"
      flock -u 8
      status=0
      wait "$timer" || status=$?
      say timer "$status"
    """
    found = told(tmp_path, script, wait_s=1)
    assert found["command"] == "status=75 mode=tailnet trial=yes open=0"
    assert found["timer"] == "status=0 mode=bootstrap trial=no open=1"


def test_the_declared_ports_are_open_to_the_tailnet_in_every_mode_and_nonsense_opens_nothing(tmp_path: Path) -> None:
    script = """
      mkdir -p /run/etc/clawdlets
      mount -t tmpfs tmpfs /etc
      mkdir /etc/clawdlets
      printf '18337\\n0\\n65536\\n22 accept\\n1x\\n*\\n' >/etc/clawdlets/tailnet-ports
      for mode in bootstrap tailnet; do
        echo "$mode" >/var/lib/clawdlets/exposure
        sh "$program" restore
        echo "$mode $(nft list table inet clawdlets | grep -o '"tailscale0" tcp dport .*' | tr '\\n' ';')"
      done
    """
    found = told(tmp_path, script)
    # "22 accept" is two words on a line: the first is a port, and open already; the second is none.
    expected = '"tailscale0" tcp dport 22 accept;"tailscale0" tcp dport 18337 accept;"tailscale0" tcp dport 22 accept;'
    assert found == {"bootstrap": expected, "tailnet": expected}
