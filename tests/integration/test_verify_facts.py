"""What the host's own program says, read by the suite: in namespaces of our own, with the real nft, sshd, stat and setpriv.

What is mounted and the network that is made end with their namespace.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clawdlets_ops import egress, hostfiles
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.process import Command, LocalRunner
from clawdlets_ops.tailnet import Peer
from clawdlets_ops.verify.expectation import build_expectation
from clawdlets_ops.verify.suite.reading import Fault, NotApplicable, Unknown, parse_frames

pytestmark = pytest.mark.integration

PATH = "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
RUNNER = LocalRunner({"PATH": PATH})
PROFILE = Path("clawdlets_ops/lab/profile")
PROGRAMS = ("unshare", "nft", "setpriv", "ip", "ss", "sshd", "ssh-keygen")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the facts program and namespaces need root")
needs_programs = pytest.mark.skipif(
    any(shutil.which(name, path=PATH) is None for name in PROGRAMS), reason=f"{', '.join(PROGRAMS)} are needed"
)


def keygen(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "canary", "-f", path], check=True)
    return path.with_suffix(".pub").read_text().strip()


WORLD = r"""
set -eu
work=$1 profile=$2
mount --make-rprivate /
ip link set lo up
ip link add eth0 type veth peer name far
ip link set eth0 up
ip link set far up
ip address add 198.18.7.10/24 dev eth0
ip -6 address add 2001:2:0:70a::1/64 dev eth0 nodad
ip route add default dev eth0
ip -6 route add default dev eth0
cp -a /etc "$work/etc"
mount --bind "$work/etc" /etc
mount -t tmpfs tmpfs /run
mount -t tmpfs -o mode=0755 tmpfs /var/lib
if [ -d /nix ]; then mount -t tmpfs tmpfs /nix; fi
mkdir -p /run/sshd
for user in admin:7001 breakglass:7002 bot-maren:7003 bot-otto:7004 clawdlets-egress:7005; do
  name=${user%:*} id=${user#*:}
  echo "$name:x:$id:$id::/nonexistent:/bin/sh" >>/etc/passwd
  echo "$name:x:$id:" >>/etc/group
done
echo 'admin:$y$j9T$canary-hash-admin:19000::::::' >>/etc/shadow
echo 'breakglass:$6$canary-hash-breakglass:19000::::::' >>/etc/shadow
echo 'bot-maren:!:19000::::::' >>/etc/shadow
rm -f /etc/ssh/ssh_host_*
cp "$work/sshd_config" /etc/ssh/sshd_config
ssh-keygen -q -t ed25519 -N '' -C canary -f /etc/ssh/ssh_host_ed25519_key
mkdir -p /etc/ssh/authorized_keys.d /etc/clawdlets
cp "$work/admin.pub" /etc/ssh/authorized_keys.d/admin
mkdir -m 0700 /var/lib/sops-nix
(umask 0377; echo AGE-SECRET-KEY-canary >/var/lib/sops-nix/key.txt)
mkdir -p -m 0755 /var/lib/clawdlets /var/lib/clawdlets/secrets /var/lib/clawdlets/secrets/hosts
encrypted=/var/lib/clawdlets/secrets/hosts/alpha
mkdir -m 0700 "$encrypted"
mkdir /run/secrets.d
mount -t ramfs -o mode=0751 ramfs /run/secrets.d
mkdir -m 0751 /run/secrets.d/1
ln -s /run/secrets.d/1 /run/secrets
echo '{"secrets": [' >/var/lib/clawdlets/secrets-wiring.json
for secret in admin_password_hash:root breakglass_password_hash:root tailscale_auth_key:root discord_token:bot-maren model_api_key:bot-maren; do
  name=${secret%:*}
  printf 'x: ENC[AES256_GCM,data:canary]\nsops:\n  mac: x\n' >"$encrypted/$name.yaml"
  chmod 0400 "$encrypted/$name.yaml"
  echo "canary-value-of-$name" >"/run/secrets.d/1/$name"
  chown "${secret#*:}:${secret#*:}" "/run/secrets.d/1/$name"
  chmod 0400 "/run/secrets.d/1/$name"
  echo "{\"name\": \"$name\", \"sopsFile\": \"$encrypted/$name.yaml\"}," >>/var/lib/clawdlets/secrets-wiring.json
done
echo '{}]}' >>/var/lib/clawdlets/secrets-wiring.json
echo tailnet >/var/lib/clawdlets/exposure
sh "$profile/clawdlets-exposure" restore
nft -f "$work/egress.nft"
cp /etc/ssh/ssh_host_ed25519_key.pub "$work/pin"
eval "$3"
exec bash "$profile/clawdlets-facts" "$4"
"""
NONCE = "0123456789abcdef" * 2
FLEET = {
    "schemaVersion": 1,
    "hosts": {
        "alpha": {
            "provisioning": {"adminCidrs": ["198.18.0.0/24"], "sshPubkeyFile": "x.pub"},
            "secrets": {"discord_token": {"owner": "bot-maren"}, "model_api_key": {"owner": "bot-maren"}},
        }
    },
}
CANARIES = ("canary-hash", "canary-value", "AGE-SECRET-KEY", "data:canary", "BEGIN OPENSSH")


def small_host(root: Path, folder: Path, *, change: str = ":") -> tuple[str, dict[str, tuple[str, str]]]:
    """Make a host of our own out of namespaces, with ``change`` (shell) done to it; what its facts program printed, and
    what the suite made of it: check → (state, text)."""
    admin = keygen(folder / "admin")
    (folder / "admin.pub").write_text(admin + "\n")
    declared = parse_fleet(json.dumps(FLEET)).host("alpha")
    (folder / "sshd_config").write_text(hostfiles.sshd_config())
    (folder / "egress.nft").write_text(egress.nft_rules(egress.policy_of(declared)))
    words = ["unshare", "--mount", "--net", "sh", "-c", WORLD, "world", folder, root / PROFILE, change, NONCE]
    began = time.time()
    printed = RUNNER.run(Command(words, "make a small host", timeout_s=60)).check().stdout
    expected = build_expectation(
        host="alpha",
        declared=declared,
        mode="tailnet",
        public={4: "198.18.7.10"},
        tailnet={4: "100.64.7.10"},
        pin=(folder / "pin").read_text(),
        admin_keys=(admin,),
        identity_file="/nowhere",
        vantages=(),
        cloud=None,
        node=Peer("alpha", {4: "100.64.7.10"}, online=True),
    )
    expected["asOf"] = "2026-11-22T10:00:00+00:00"
    facts = {"problem": None, "network": "tailnet", "address": "100.64.7.10", "sections": parse_frames(printed, NONCE)}
    facts["asked"] = {"from": began, "to": time.time()}
    results = {}
    for module in ("test_ssh", "test_exposure", "test_network", "test_files"):
        found = importlib.import_module(f"clawdlets_ops.verify.suite.{module}")
        for name, function in inspect.getmembers(found, inspect.isfunction):
            wanted = inspect.signature(function).parameters
            if name.startswith("test_") and "facts" in wanted and not {"attempt", "exposure"} & set(wanted):
                check = next(mark for mark in function.pytestmark if mark.name == "check").kwargs["id"]
                given = {"expected": expected, "facts": facts, "observe": lambda text: None}
                try:
                    function(**{word: given[word] for word in wanted})
                    results[check] = ("pass", "")
                except Fault as error:
                    results[check] = ("fail", str(error))
                except Unknown as error:
                    results[check] = ("unknown", str(error))
                except NotApplicable as error:
                    results[check] = ("not-applicable", str(error))
    return printed, results


# systemd, sudo, a listening sshd, a session and a metadata service are not there: what is about them must be unknown.
UNSEEN = {"SSH-02", "SSH-07", "SSH-08", "EXP-06", "EXP-07", "EXP-10", "TS-02", "UD-04", "STO-06"}
# There is no store.
BESIDE = {"STO-01", "STO-03"}


@pytest.fixture
def marker(pytestconfig: pytest.Config) -> None:
    """The suite's marker, which its own plugin registers."""
    pytestconfig.addinivalue_line(
        "markers", "check(id, severity, claim, fix, vantage): the entry of the check catalogue"
    )


@needs_root
@needs_programs
@pytest.mark.usefixtures("marker")
def test_the_facts_of_a_good_host_satisfy_the_suite_and_hold_no_secret(root: Path, tmp_path: Path) -> None:
    printed, results = small_host(root, tmp_path)
    assert {check for check, (state, _) in results.items() if state == "not-applicable"} == BESIDE, results
    assert {check for check, (state, _) in results.items() if state != "pass"} - BESIDE == UNSEEN, results
    assert all(results[check][0] == "unknown" for check in UNSEEN), results
    assert {"SSH-01", "SSH-06", "EXP-03", "EGR-01", "FS-01", "FS-02", "FS-03", "FS-04", "STO-04"} <= results.keys()
    planted = (tmp_path / "etc" / "shadow").read_text()
    assert "canary-hash" in planted  # the search below would find one
    assert [canary for canary in CANARIES if canary in printed] == []
    assert "admin yescrypt\nbreakglass sha512\nbot-maren locked" in printed


@needs_root
@needs_programs
@pytest.mark.usefixtures("marker")
@pytest.mark.parametrize(
    ("checks", "change"),
    [
        (
            {"SSH-01"},
            "printf 'Match User root Address 127.0.0.1\\n  PasswordAuthentication yes\\n' >>/etc/ssh/sshd_config",
        ),
        ({"SSH-06"}, "cp /etc/ssh/ssh_host_ed25519_key.pub /etc/ssh/authorized_keys.d/root"),
        ({"EXP-03"}, "nft add rule inet clawdlets input ip6 saddr 2001:db8::/32 tcp dport 22 accept"),
        ({"EXP-03", "EGR-01", "EGR-02", "EGR-03"}, "nft flush ruleset"),
        ({"EGR-01", "EGR-03"}, "nft flush chain inet clawdlets-egress output"),
        ({"EGR-02"}, "nft flush chain inet clawdlets-egress forward"),
        ({"EGR-01", "EGR-03"}, "nft insert rule inet clawdlets-egress output ip6 daddr 2000::/3 accept"),
        # Mail gets past the rule that counts, and it is the network that says no: as where nothing answers.
        (
            {"EGR-01", "EGR-03"},
            "nft 'insert rule inet clawdlets-egress output ip6 daddr 2001:db8::/32 accept; add table inet world; "
            "add chain inet world out { type filter hook output priority 10; }; "
            "add rule inet world out ip6 daddr 2001:db8::/32 reject with icmpx no-route'",
        ),
        ({"SSH-10"}, "sed -i 's/^macs .*/&,hmac-sha1/I' /etc/ssh/sshd_config"),
        ({"FS-01"}, "chmod 0440 /var/lib/sops-nix/key.txt"),
        ({"FS-01", "FS-04"}, "chmod 0711 /var/lib/sops-nix; chmod 0404 /var/lib/sops-nix/key.txt"),
        ({"FS-02"}, "cp -a /var/lib/clawdlets/secrets/hosts/alpha /var/lib/clawdlets/secrets/hosts/beta"),
        ({"FS-03"}, "chown bot-maren:admin /run/secrets/discord_token"),
        ({"FS-03", "FS-04"}, "chown bot-otto /run/secrets/discord_token"),
        ({"FS-03"}, "mkdir /run/secrets.d/2"),
    ],
)
def test_a_fault_on_a_small_host_is_seen(root: Path, tmp_path: Path, checks: set[str], change: str) -> None:
    _, results = small_host(root, tmp_path, change=change)
    assert {check for check, (state, _) in results.items() if state == "fail"} == checks, results


@needs_root
@needs_programs
@pytest.mark.usefixtures("marker")
def test_a_bot_that_stops_what_runs_as_itself_does_not_hold_up_the_others(root: Path, tmp_path: Path) -> None:
    """As a bot may: it stops every process of its own user, again and again. Its attempts prove nothing then; all else is said."""
    stop = "while :; do kill -STOP -1; sleep 0.02; done"
    # in its own process group and session, so that it does not stop itself; ends with the namespace's shell
    change = f"setsid setpriv --reuid bot-maren --regid 7003 --clear-groups sh -c 'trap \"\" STOP; {stop}' & echo $! >$work/stopper"
    began = time.monotonic()
    try:
        printed, results = small_host(root, tmp_path, change=change)
    finally:
        os.kill(int((tmp_path / "stopper").read_text()), signal.SIGKILL)
    assert time.monotonic() - began < 200
    assert results["SSH-06"] == ("pass", "")
    assert results["EGR-03"][0] == "unknown"
    assert "=== " + NONCE + " end system" in printed


@needs_root
@needs_programs
@pytest.mark.usefixtures("marker")
def test_a_busy_machine_loses_no_attempt(root: Path, tmp_path: Path) -> None:
    """Eight hosts on this machine's few cores: what root and the bot try is seen to be dropped, every time."""
    folders = [tmp_path / f"host-{number}" for number in range(8)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(max_workers=len(folders)) as pool:
        for printed, results in pool.map(lambda folder: small_host(root, folder), folders):
            tried = parse_frames(printed, NONCE)["mail-out"]["text"].splitlines()
            assert len(tried) == 2 * 2 * 4
            assert [line for line in tried if not line.endswith(" dropped")] == []
            assert results["EGR-03"] == ("pass", "")


@pytest.mark.parametrize(
    "words", [[], ["canary"], ["A" * 32], ["0" * 31], ["0" * 33], ["0" * 31 + "\n"], ["0" * 32, "x"]]
)
def test_the_facts_program_takes_one_nonce_and_nothing_else(root: Path, words: list[str]) -> None:
    result = RUNNER.run(Command(["bash", root / PROFILE / "clawdlets-facts", *words], "ask for facts"))
    assert (result.exit_code, result.stdout) == (64, "")
