"""Importing the other's configurations: what is taken, what is named, and that nothing becomes more open than it said."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from clawdlets_ops import peer
from clawdlets_ops.cli import clawdlets
from clawdlets_ops.errors import FleetError
from clawdlets_ops.fleet import Fleet, parse_fleet
from tests.peer_configs import KEY, OTHER_KEY, infra2, lived_in, of_version, v12

SAID = peer.Decisions(admin_cidrs=("203.0.113.0/24",))


def read(document: object, said: peer.Decisions | None = None, **more: Any) -> peer.Imported:
    return peer.read(json.dumps(document), where="theirs.json", said=said, **more)


def accepted(document: object, said: peer.Decisions | None = None) -> Fleet:
    got = read(document, said)
    assert got.refused == ()
    return parse_fleet(json.dumps(got.document))


def refusals(document: object, said: peer.Decisions | None = None) -> dict[str, str]:
    return {note.path: note.why for note in read(document, said).refused}


@pytest.mark.parametrize("version", range(7, 13))
def test_each_version_becomes_the_same_fleet(version: int) -> None:
    fleet = accepted(of_version(version))
    assert list(fleet.hosts) == ["alpha", "bravo"]
    alpha, bravo = fleet.hosts.values()
    assert alpha.provisioning.admin_cidrs == ("203.0.113.7/32",)
    assert alpha.provisioning.admin_cidr_allow_world_open is False
    assert bravo.provisioning.admin_cidrs == ("2001:db8:7::/48",)
    assert bravo.provisioning.ssh_pubkey_file == "~/.ssh/other.pub"
    assert (alpha.target_host, bravo.target_host) == ("admin@100.64.0.9", None)  # the other was not on the tailnet
    assert (alpha.system, bravo.system) == ("x86_64-linux", "aarch64-linux")
    assert (bravo.hetzner.server_type, bravo.hetzner.location, bravo.hetzner.image) == ("cax21", "fsn1", "debian-12")
    assert {host.ssh_exposure.mode for host in fleet.hosts.values()} == {"tailnet"}
    keys = (KEY, OTHER_KEY) if version < 10 else (KEY,)
    assert alpha.ssh_authorized_keys == keys
    assert list(alpha.bots) == ["maren", "two-words"]
    assert set(alpha.bots["maren"].secrets) == {"discord_token_maren", "app_key"}
    assert alpha.secrets["app_key"].owner == "bot-maren"
    assert (alpha.secrets["model_api_key"].owner, alpha.secrets["shared_netrc"].mode) == ("root", "0400")


def test_what_was_changed_or_left_out_is_named() -> None:
    notes = {note.path: note for note in read(lived_in()).notes}
    assert notes["fleet.secretEnv.MODEL_API_KEY"].why == "the secret is called model_api_key here"
    assert notes["fleet.secretFiles.netrc.mode"].why == "0444 is tightened to 0400"
    assert "bot is called two-words" in notes["fleet.bots.two_words"].why
    assert "one owner" in notes["hosts.alpha.secrets.model_api_key"].why
    assert notes["hosts.bravo.targetHost"].kind == "left out"
    assert notes["hosts.bravo.hetzner.image"].kind == "left out"
    assert notes["hosts.bravo.selfUpdate"].kind == "left out"
    assert notes["fleet.bots.maren.profile.github"].kind == "left out"
    assert "hosts.alpha.operator" not in notes  # switched off, it says nothing


def test_the_template_as_it_stands_is_refused_for_what_is_still_to_be_decided() -> None:
    assert set(refusals(v12())) == {"hosts.first-box.provisioning.adminCidr"}
    host = accepted(v12(), SAID).host("first-box")
    assert (host.ssh_exposure.mode, host.tailnet.mode) == ("bootstrap", "none")
    assert host.provisioning.admin_cidrs == SAID.admin_cidrs


def test_the_later_products_infrastructure() -> None:
    host = accepted(infra2()).host("claw-box")
    assert host.tailnet.allow_udp_ingress is False
    assert host.hetzner.volumes["data"].size_gb == 50
    assert list(host.bots) == ["main"]
    assert host.secrets["model_api_key"].owner == "bot-main"
    document = infra2()
    document["hosts"]["claw-box"]["provisioning"]["provider"] = "aws"
    assert "hosts.claw-box.provisioning.provider" in refusals(document)
    document = infra2()
    document["hosts"]["claw-box"]["hetzner"]["volumeSizeGb"] = 3
    assert "hosts.claw-box.hetzner.volumes.data.sizeGb" in refusals(document)


@pytest.mark.parametrize(
    "cidr", ["0.0.0.0/1", "128.0.0.0/1", "1.2.3.4/0", "::0/0", "0::/0", "::/0", "0.0.0.0/0", "2000::/3"]
)
@pytest.mark.parametrize("version", [7, 12])
def test_the_world_by_another_name_is_refused(version: int, cidr: str) -> None:
    document = of_version(version)
    document["hosts"]["alpha"]["provisioning"]["adminCidr"] = cidr
    assert "the internet at large" in refusals(document)["hosts.alpha.provisioning.adminCidr"]
    assert accepted(document, SAID).host("alpha").provisioning.admin_cidrs == SAID.admin_cidrs


def test_the_world_that_was_said_stays_said() -> None:
    document = lived_in()
    document["hosts"]["alpha"]["provisioning"] |= {"adminCidr": "0.0.0.0/0", "adminCidrAllowWorldOpen": True}
    host = accepted(document).host("alpha")
    assert host.provisioning.admin_cidr_allow_world_open
    # Another network in its place takes the permission away with it.
    assert not accepted(document, SAID).host("alpha").provisioning.admin_cidr_allow_world_open


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "unreachable": (
        lambda d: d["hosts"]["alpha"].update(tailnet={"mode": "none"}), "hosts.alpha.sshExposure.mode", "nobody can reach",
    ),
    "misspelt host key": (
        lambda d: d["hosts"]["alpha"].update(sshExposre={"mode": "tailnet"}), "hosts.alpha.sshExposre", "did you mean 'sshExposure'?",
    ),
    "misspelt deep": (
        lambda d: d["hosts"]["alpha"]["provisioning"].update(adminCdr="x"), "hosts.alpha.provisioning.adminCdr", "did you mean 'adminCidr'?",
    ),
    "misspelt top": (lambda d: d.update(host={}), "host", "did you mean 'hosts'?"),
    "a key of an older version": (
        lambda d: d["hosts"]["alpha"].update(sshAuthorizedKeys=[KEY]), "hosts.alpha.sshAuthorizedKeys", "no such key in this version",
    ),
    "an old switch": (lambda d: d["hosts"]["alpha"].update(publicSsh={"enable": True}), "hosts.alpha.publicSsh", "no such key"),
    "disk": (lambda d: d["hosts"]["alpha"].update(diskDevice="rm -rf /"), "hosts.alpha.diskDevice", ""),
    "disk to fill in": (lambda d: d["hosts"]["alpha"].update(diskDevice="/dev/disk/by-id/CHANGE_ME"), "hosts.alpha.diskDevice", "filled in"),
    "host bits": (
        lambda d: d["hosts"]["alpha"]["provisioning"].update(adminCidr="10.0.0.5/24"), "hosts.alpha.provisioning.adminCidr", "did you mean 10.0.0.0/24?",
    ),
    "an old key type": (lambda d: d["fleet"].update(sshAuthorizedKeys=["ssh-rsa AAAA x"]), "hosts.alpha.sshAuthorizedKeys", "not accepted"),
    "a private key": (
        lambda d: d["fleet"].update(sshAuthorizedKeys=["-----BEGIN OPENSSH PRIVATE KEY----- canary"]), "hosts.alpha.sshAuthorizedKeys", "private key",
    ),
    "options of a key": (
        lambda d: d["fleet"].update(sshAuthorizedKeys=['command="x" ' + KEY]), "hosts.alpha.sshAuthorizedKeys", "no options",
    ),
    "a host's name": (lambda d: d["hosts"].update({"a-": d["hosts"].pop("alpha")}), "hosts.a-", ""),
    "a mode of exposure": (lambda d: d["hosts"]["alpha"].update(sshExposure={"mode": "open"}), "hosts.alpha.sshExposure.mode", ""),
    "text for a switch": (
        lambda d: d["hosts"]["alpha"]["provisioning"].update(adminCidrAllowWorldOpen="no"), "hosts.alpha.provisioning.adminCidrAllowWorldOpen", "true or false",
    ),
    "two secrets of one name": (
        lambda d: d["fleet"].update(secretEnv={"A": "one-key", "B": "one_key"}), "fleet.secretEnv.B", "two secrets",
    ),
    "two bots of one name": (
        lambda d: d["fleet"]["bots"].update({"two-words": {}}), "fleet.bots.two-words", "two bots",
    ),
    "no hosts": (lambda d: d.update(hosts={}), "hosts", ""),
    "hosts as a list": (lambda d: d.update(hosts=["alpha"]), "hosts", "not of the kind object"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_other_lets_pass_is_refused_by_name(name: str) -> None:
    change, path, said = CHANGES[name]
    document = lived_in()
    change(document)
    found = refusals(document)
    assert path in found, found
    assert said in found[path]
    assert "canary" not in str(found)


@pytest.mark.parametrize("version", [1, 6, 13, 14, 0, -7, "12", None, True, 12.5, [12]])
def test_other_versions_are_not_guessed_at(version: object) -> None:
    with pytest.raises(FleetError, match="7 to 12 are, and 2"):
        read({**lived_in(), "schemaVersion": version})


def places(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, part in value.items():
            found += places(part, (*path, key))
    return found


def put(document: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    part = changed
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return changed


WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2), st.sampled_from(["0.0.0.0/1", "::0/0", "../x", "a\nb", "\x1b[31m"]),
)  # fmt: skip


@given(path=st.sampled_from(places(lived_in())), value=WRONG)
@settings(max_examples=300, deadline=None)
def test_whatever_stands_anywhere_is_a_fleet_or_a_list_of_refusals(path: tuple[str, ...], value: object) -> None:
    """Never a traceback, and what is not refused opens nothing: no network of the world without its permission."""
    try:
        got = read(put(lived_in(), path, value))
    except FleetError:
        return
    for note in got.notes:
        assert note.path
        assert note.why
    if got.refused:
        return
    fleet = parse_fleet(json.dumps(got.document))
    for host in fleet.hosts.values():
        assert not host.provisioning.admin_cidr_allow_world_open or value is True
        assert host.ssh_exposure.mode != "public" or value == "public"


def test_the_command(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps(v12()))
    (tmp_path / "p" / "fleet").mkdir(parents=True)

    def run(*words: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(clawdlets, ["--project", str(tmp_path / "p"), "fleet", "import", str(theirs), *words])
        return done.exit_code, done.stdout, done.stderr + str(done.exception or "")

    status, out, err = run()
    assert (status, out) == (1, "")
    assert "refused   hosts.first-box.provisioning.adminCidr: is empty" in err
    assert "nothing was imported" in err
    status, out, err = run("--admin-cidr", "203.0.113.0/24")
    assert status == 0, err
    assert list(parse_fleet(out).hosts) == ["first-box"]
    assert "left out  hosts.first-box.cache" in err
    status, out, err = run("--admin-cidr", "203.0.113.0/24", "--write")
    assert status == 0, err
    written = tmp_path / "p" / "fleet" / "clawdlets.json"
    assert list(parse_fleet(written.read_text()).hosts) == ["first-box"]
    status, out, err = run("--admin-cidr", "203.0.113.0/24", "--write")
    assert status == 1
    assert "is there already" in err
    assert "there is no host 'x'" in run("--host", "x")[2]
