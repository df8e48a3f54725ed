"""The gates before the first byte, one by one. Run as a program, it writes docs/reference/install-gates.md anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops.errors import InstallRefused
from clawdlets_ops.finding import Finding, State
from clawdlets_ops.fleet import Host, parse_fleet
from clawdlets_ops.install import gates
from clawdlets_ops.install.gates import CLAIMS, Shipment, Target, refuse, shipment_gates, target_gates

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "install-gates.md"
KEY_LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s canary@example"
DEBIAN = 'ID=debian\nVERSION_ID="12"\n'
INSTALLER = 'ID=nixos\nVARIANT_ID="installer"\n'
NIXOS = 'ID=nixos\nVERSION_ID="25.05"\n'


def declared(**more: Any) -> Host:
    host = {"provisioning": {"adminCidrs": ["203.0.113.0/24"]}, "sshAuthorizedKeys": [KEY_LINE], **more}
    return parse_fleet(json.dumps({"schemaVersion": 1, "hosts": {"alpha": host}})).host("alpha")


def disk(
    path: str, *, kind: str = "disk", size: int = 40_960_000_000, ro: bool = False, label: str = ""
) -> dict[str, Any]:
    part = {"path": f"{path}1", "type": "part", "size": size, "ro": ro, "partlabel": label or None}
    return {"path": path, "type": kind, "size": size, "ro": ro, "partlabel": None, "children": [part]}


def lsblk(*disks: dict[str, Any]) -> str:
    return json.dumps({"blockdevices": list(disks)})


CD = disk("/dev/sr0", kind="rom")
FINE = Target("x86_64", DEBIAN, 4_000_000_000, lsblk(disk("/dev/sda"), CD), "/dev/sda")
SHIPS = Shipment("", "current", ("alpha", "beta"))
BY_ID = "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_1"
TWO = lsblk(disk("/dev/sda"), disk("/dev/sdb", size=10_737_418_240), CD)

# What is observed → the gates that close. The first word of a row of the table.
CLOSED: dict[str, tuple[Host, Target | Shipment, set[str]]] = {
    "an ARM server for an x86 host": (declared(), replace(FINE, machine="aarch64"), {"INSTALL-01"}),
    "no architecture told": (declared(), replace(FINE, machine=""), {"INSTALL-01"}),
    "a server with 1 GB": (declared(), replace(FINE, memory_bytes=1_020_000_000), {"INSTALL-02"}),
    "no memory told": (declared(), replace(FINE, memory_bytes=None), {"INSTALL-02"}),
    "two disks, named by /dev/sda": (declared(), replace(FINE, block_devices=TWO), {"INSTALL-03"}),
    "no such disk": (declared(diskDevice="/dev/vda"), replace(FINE, device="/dev/vda"), {"INSTALL-03"}),
    "a partition": (declared(diskDevice="/dev/sda1"), replace(FINE, device="/dev/sda1"), {"INSTALL-03"}),
    "a read-only disk": (declared(), replace(FINE, block_devices=lsblk(disk("/dev/sda", ro=True))), {"INSTALL-03"}),
    "no disks told": (declared(), replace(FINE, block_devices=""), {"INSTALL-03"}),
    "an installed NixOS": (declared(), replace(FINE, os_release=NIXOS), {"INSTALL-04"}),
    "no system told": (declared(), replace(FINE, os_release=""), {"INSTALL-04"}),
    "our install marker": (declared(), replace(FINE, marker='{"host": "alpha"}'), {"INSTALL-05"}),
    "the rescue system of an installed host": (
        declared(),
        replace(FINE, block_devices=lsblk(disk("/dev/sda", label="disk-main-root"))),
        {"INSTALL-05"},
    ),
    "a secret that the host cannot open": (
        declared(),
        replace(SHIPS, secrets="secrets/hosts/alpha/discord_token.yaml: is not encrypted to the host's key"),
        {"INSTALL-06"},
    ),
    "a payload of yesterday": (declared(), replace(SHIPS, payload="stale"), {"INSTALL-07"}),
    "no payload": (declared(), replace(SHIPS, payload="absent"), {"INSTALL-07"}),
    "a flake without the host": (declared(), replace(SHIPS, configurations=("beta",)), {"INSTALL-08"}),
    "a flake that Nix cannot read": (
        declared(),
        replace(
            SHIPS, configurations=(), flake="nix cannot read the flake: error: syntax error, unexpected end of file"
        ),
        {"INSTALL-08"},
    ),
}

# What is observed, and is no reason to stop.
OPEN: dict[str, tuple[Host, Target | Shipment]] = {
    "a fresh Debian": (declared(), FINE),
    "an ARM server for an ARM host": (declared(system="aarch64-linux"), replace(FINE, machine="aarch64")),
    "the installer": (declared(), replace(FINE, os_release=INSTALLER)),
    "the installer after its formatting": (
        declared(),
        replace(FINE, os_release=INSTALLER, marker="{}", block_devices=lsblk(disk("/dev/sda", label="disk-main-root"))),
    ),
    "two disks, named by id": (declared(diskDevice=BY_ID), replace(FINE, block_devices=TWO)),
    "memory and loop devices beside the disk": (
        declared(),
        replace(FINE, block_devices=lsblk(disk("/dev/sda"), disk("/dev/zram0"), disk("/dev/loop0", kind="loop"))),
    ),
    "everything ready to be shipped": (declared(), SHIPS),
    "no Nix on this machine": (declared(), replace(SHIPS, configurations=None, flake="nix is not on PATH")),
}


def judge(host: Host, observed: Target | Shipment) -> tuple[Finding, ...]:
    return target_gates("alpha", host, observed) if isinstance(observed, Target) else shipment_gates("alpha", observed)


@pytest.mark.parametrize("case", CLOSED)
def test_a_gate_closes_alone_and_says_what_to_do(case: str) -> None:
    host, observed, closes = CLOSED[case]
    findings = judge(host, observed)
    assert {finding.check for finding in findings if finding.state is not State.PASS} == closes
    with pytest.raises(InstallRefused, match=r"nothing on it was changed") as caught:
        refuse("alpha", findings)
    assert all(check in caught.value.what for check in closes)
    assert caught.value.where == "alpha"


@pytest.mark.parametrize("case", OPEN)
def test_a_gate_lets_pass_what_is_to_be_installed(case: str) -> None:
    findings = judge(*OPEN[case])
    refuse("alpha", findings)
    unknown = {finding.check for finding in findings if finding.state is State.UNKNOWN}
    assert unknown <= gates.MAY_BE_UNKNOWN


def test_all_closed_gates_are_named_at_once() -> None:
    worst = Target("aarch64", NIXOS, 512_000_000, TWO, "/dev/sda", marker="{}")
    with pytest.raises(InstallRefused) as caught:
        refuse("alpha", target_gates("alpha", declared(), worst))
    assert [f"INSTALL-0{number}" in caught.value.what for number in range(1, 6)] == [True] * 5


def test_what_lsblk_says_may_be_anything() -> None:
    for said in ("[]", "{}", '{"blockdevices": null}', '{"blockdevices": [{}]}', '{"blockdevices": [1]}', "\x00"):
        found = {f.check: f.state for f in target_gates("alpha", declared(), replace(FINE, block_devices=said))}
        assert found["INSTALL-03"] is State.UNKNOWN, said


def test_every_gate_is_in_the_table_and_the_table_is_as_the_code_has_it() -> None:
    assert {check for _, _, closes in CLOSED.values() for check in closes} == set(CLAIMS)
    assert DOCUMENT.read_text() == document(), "write it anew: python tests/unit/test_install_gates.py"


def document() -> str:
    lines = [
        "# The gates before an installation",
        "",
        "Before a byte on a server is changed, and again before each phase, `install` asks these questions. All that are",
        "answered wrongly are named at once; the error is `InstallRefused`, and `pyinfra` and `clawdlets bootstrap` end with",
        "status 1. *Unknown* closes a gate as *no* does, but for INSTALL-08: without Nix on the operator's machine the flake",
        "cannot be asked, and nixos-anywhere itself, which needs Nix, stops before it reaches the server.",
        "",
        "This page is written by `python tests/unit/test_install_gates.py`; a test holds it.",
        "",
        "| Gate | What must be true |",
        "| --- | --- |",
        *(f"| {check} | {claim} |" for check, claim in CLAIMS.items()),
        "",
        "| Observed | Gate | Answer | Message | What to do | Status |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case, (host, observed, closes) in CLOSED.items():
        for finding in judge(host, observed):
            if finding.check in closes:
                answer = "no" if finding.state is State.FAIL else "unknown"
                lines.append(f"| {case} | {finding.check} | {answer} | {finding.observed} | {finding.fix} | 1 |")
    lines += [
        "",
        "Who answers is looked at before that, without a login:",
        "",
        "| The server shows | Seen as | What is done | Status |",
        "| --- | --- | --- | --- |",
        "| its pinned host key | installed | nothing; an unfinished receipt is written | 0 |",
        "| the key that it had when it was first met | fresh | the gates, then the installation | |",
        "| any key, and it was never met before | fresh | that key is pinned, then the gates | |",
        "| another key, and it was met or installed before | stranger | `HostKeyError` | 1 |",
        "| nothing, its edge open | unknown | waited for, 300 s; 120 s if it was met before; then `UnreachableError` | 1 |",
        "| nothing, its edge closed | unknown | `UnreachableError` at once | 1 |",
        "",
        "A host that is to be overwritten is named: `--data reinstall=HOST`. It is then rebuilt from its image.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
