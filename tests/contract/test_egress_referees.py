"""What is rendered for a host, given to the programs that will read it: nft, squid, systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from clawdlets_ops import egress
from tests.egress_fleet import host_in

MODES = ("smtp-only", "proxy-allowlist", "none")
WORST_SCORE = 2.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: names of users are put in place in a namespace")


def with_users(names: tuple[str, ...], folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """``script`` where these users exist and there is no network; nothing outside the namespaces changes."""
    passwd = folder / "passwd"
    users = "".join(f"{name}:x:{70000 + place}:70000::/:/bin/false\n" for place, name in enumerate(names))
    passwd.write_text(Path("/etc/passwd").read_text() + users)
    return subprocess.run(
        ["unshare", "-mn", "sh", "-euc", f"mount --bind {passwd} /etc/passwd; cd {folder}; {script}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.skipif(not shutil.which("nft"), reason="needs nft")
@pytest.mark.parametrize("mode", MODES)
def test_nft_takes_the_rules_also_a_second_time(tmp_path: Path, mode: str) -> None:
    host = host_in(mode)
    (tmp_path / "rules.nft").write_text(egress.nft_rules(egress.policy_of(host)))
    users = egress.service_users(host)
    done = with_users(users, tmp_path, "nft -c -f rules.nft; nft -f rules.nft; nft -f rules.nft; nft -j list ruleset")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"table": {"family"') == 1
    (tmp_path / "rules.nft").write_text(egress.nft_rules(egress.policy_of(host)) + "nonsense\n")
    assert with_users(users, tmp_path, "nft -c -f rules.nft").returncode != 0


@pytest.mark.skipif(not shutil.which("squid"), reason="needs squid")
@pytest.mark.parametrize("mode", MODES)
def test_squid_takes_its_configuration_without_a_complaint(tmp_path: Path, mode: str) -> None:
    for name, text in egress.etc_files(host_in(mode)).items():
        (tmp_path / name).write_text(text.replace("/etc/clawdlets/egress", str(tmp_path)))
    done = subprocess.run(["squid", "-k", "parse", "-f", tmp_path / "squid.conf"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line or "FATAL" in line]
    assert [line for line in complaints if "HTTP requires the use of Via" not in line] == []
    (tmp_path / "squid.conf").write_text("http_port 127.0.0.1:3128\nhttp_acess deny all\n")
    assert (
        "unrecognized"
        in subprocess.run(
            ["squid", "-k", "parse", "-f", tmp_path / "squid.conf"], capture_output=True, text=True
        ).stderr
    )


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("mode", MODES)
def test_systemd_takes_the_units_and_scores_them_as_little_exposed(tmp_path: Path, mode: str) -> None:
    host = host_in(mode)
    units = egress.units(host, nft="/usr/sbin/nft", squid="/bin/true", left_open="/bin/true")
    for name, text in units.items():
        (tmp_path / name).write_text(text.replace("/usr/bin/tight", "/bin/true"))
    done = with_users(egress.service_users(host), tmp_path, "systemd-analyze verify ./*.service")
    assert (done.returncode, done.stderr) == (0, "")
    for name in units:
        if name != egress.RULES_UNIT:
            scored = with_users((), tmp_path, f"systemd-analyze security --offline=true ./{name} | tail -n 1")
            assert float(scored.stdout.split(":")[1].split()[0]) <= WORST_SCORE, scored.stdout
    (tmp_path / egress.RULES_UNIT).write_text("[Service]\nExecStrat=/bin/true\n")
    assert with_users((), tmp_path, "systemd-analyze verify ./*.service").stderr
