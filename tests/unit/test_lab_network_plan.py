"""The lab's addresses, the nftables text, the disk, first boot, metadata and the claims: without any machine."""

from __future__ import annotations

import base64
import gzip
import os
import subprocess
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import yaml

from clawdlets_ops.errors import LabError
from clawdlets_ops.fleet import load_fleet
from clawdlets_ops.lab import first_boot, metadata
from clawdlets_ops.lab.addressing import (
    MAX_NUMBER,
    Addressing,
    plan_attach,
    plan_join,
    plan_nodes,
    plan_second_network,
    plan_up,
)
from clawdlets_ops.lab.backend import BackendError, MachineSpec, Rule
from clawdlets_ops.lab.disk import PROFILE, Disk, copy_tree
from clawdlets_ops.lab.machine import Desired
from clawdlets_ops.lab.packet_filter import render_cloud
from clawdlets_ops.lab.processes import ProcessId
from clawdlets_ops.lab.registry import LabRecord, claim_number, claimable, read_record, release_number
from clawdlets_ops.process import Command, LocalRunner, Result

ROOT = Path(__file__).parents[2]


class RoutesRunner:
    """Answers ``ip route show`` and nothing else."""

    def __init__(self, routes: str = "default via 192.0.2.1 dev eth0\n") -> None:
        self._routes = routes

    def run(self, command: Command, *, on_line: object = None) -> Result:
        assert command.argv[:1] == ("ip",)
        assert "route" in command.argv
        return Result(command, 0, self._routes if "-4" in command.argv else "", "", 0.0)

    def which(self, program: str) -> Path | None:
        return Path("/bin") / program


@pytest.mark.parametrize("number", [1, 2, 17, MAX_NUMBER])
def test_every_address_is_its_labs_alone(number: int) -> None:
    net = Addressing(number)
    ours = {
        address for key in (10, 254) for address in (net.server(key)[0], net.server(key)[1].replace("::/64", "::1"))
    }
    ours |= {address for last in (2, 3, 4) for address in net.outside(last)}
    ours |= {address for last in (1, 2, 3, 10, 254) for address in net.tailnet(last)}
    ours |= set(net.operator)
    assert len(ours) == 4 + 6 + 10 + 2
    for address in ours:
        assert any(ip_address(address) in network for network in net.networks)
    for other in {1, 2, 17, MAX_NUMBER} - {number}:
        for theirs in Addressing(other).networks:
            assert not any(theirs.version == mine.version and theirs.overlaps(mine) for mine in net.networks)


@pytest.mark.parametrize("number", [1, 17, MAX_NUMBER])
def test_the_example_fleet_admits_every_operator_and_no_stranger(number: int) -> None:
    admitted = [
        ip_network(c) for c in load_fleet(ROOT / "fleet" / "clawdlets.json").host("alpha").provisioning.admin_cidrs
    ]

    def is_admitted(address: str) -> bool:
        return any(ip_address(address) in network for network in admitted)

    net = Addressing(number)
    assert all(map(is_admitted, net.operator))
    assert not any(map(is_admitted, [*net.outside(2), net.server(10)[0], net.server(10)[1].replace("::/64", "::1")]))


def test_an_address_leads_back_to_its_server() -> None:
    net = Addressing(17)
    ipv4, ipv6 = net.allocate(0)
    assert (ipv4, ipv6) == ("198.18.17.10", "2001:2:0:110a::/64")
    assert net.key_of(ipv4) == net.key_of("2001:2:0:110a::1") == 10
    for stranger in ("198.18.17.1", "198.18.18.10", "198.19.17.10", "127.0.0.1", "2001:2::11", "2001:2:0:1100::2"):
        assert net.key_of(stranger) is None
    with pytest.raises(BackendError):
        net.allocate(245)


@pytest.mark.parametrize("number", [1, MAX_NUMBER])
def test_names_fit_into_what_linux_takes(number: int) -> None:
    net = Addressing(number)
    lines = [
        line
        for batch in [
            *plan_up(net),
            *plan_second_network(net),
            *plan_nodes(net),
            *plan_attach(net, 123456, *net.server(254)),
            *plan_join(net, 123456, 254),
        ]
        for line in batch.lines
    ]
    devices = {line.split()[line.split().index("dev") + 1] for line in lines if " dev " in line}
    devices |= {line.split()[2] for line in lines if line.startswith("link add")}
    assert {"eth0", "tailscale0", *net.operator_legs} <= devices
    assert all(len(device) <= 15 for device in devices)


SSH = Rule("in", "tcp", "22", ("198.18.0.0/24", "2001:2::/64"), "ssh")


def chain(text: str, name: str) -> list[str]:
    inside = text.split(f"chain {name} {{")[1].split("}\n  chain")[0]
    return [line.strip() for line in inside.splitlines() if line.strip() not in ("", "}")]


def test_the_cloud_firewall_is_replaced_whole() -> None:
    text = render_cloud({1001: (SSH,)})
    assert text.splitlines()[:3] == ["table inet cloud", "delete table inet cloud", "table inet cloud {"]
    assert 'oifname "s1001" jump in_1001' in chain(text, "forward")
    assert 'iifname "s1001" jump out_1001' in chain(text, "input")


def test_inbound_is_dropped_as_soon_as_a_firewall_is_attached() -> None:
    text = render_cloud({1: None, 2: (), 3: (SSH,)})
    assert chain(text, "in_1") == ["return"]
    assert chain(text, "in_2")[-1] == "drop"
    assert chain(text, "in_3")[-3:] == [
        "ip saddr { 198.18.0.0/24 } tcp dport 22 return",
        "ip6 saddr { 2001:2::/64 } tcp dport 22 return",
        "drop",
    ]
    for name in ("in_2", "in_3"):
        assert chain(text, name)[0] == "ct state established,related return"
        assert "nd-neighbor-solicit" in chain(text, name)[1]


def test_what_servers_need_always_passes_and_nobody_else_has_it() -> None:
    out = Rule("out", "tcp", "443", ("0.0.0.0/0",), None)
    text = render_cloud({1: (out,)})
    always = chain(text, "out_1")[1:-2]
    assert "ip daddr 169.254.169.254 tcp dport 80 return" in always
    assert any("2a01:4ff:ff00::add:1" in line and "th dport 53 return" in line for line in always)
    # DHCP from the gateway only: a stranger who sends from port 67 gets nothing through.
    assert [line for line in chain(text, "in_1") if "67" in line] == [
        "ip saddr 172.31.1.1 udp sport 67 udp dport 68 return"
    ]
    assert chain(text, "input")[1].startswith('iifname { "op", "out" } ip daddr { 169.254.169.254, ')


def test_flows_go_on_unless_they_are_to_be_cut() -> None:
    kept, cut = render_cloud({1: (SSH,)}), render_cloud({1: (SSH,)}, cut_established=True)
    assert chain(kept, "in_1")[0] == "ct state established,related return"
    assert chain(cut, "in_1")[:2] == ["ct state related return", "ct state established ct direction reply return"]
    assert chain(cut, "in_1")[2:] == chain(kept, "in_1")[1:]


def test_outbound_is_open_until_there_is_an_out_rule() -> None:
    out = Rule("out", "tcp", "443", ("0.0.0.0/0",), None)
    text = render_cloud({1: (SSH,), 2: (SSH, out)})
    assert chain(text, "out_1") == ["return"]
    assert chain(text, "out_2")[-2:] == ["ip daddr { 0.0.0.0/0 } tcp dport 443 return", "drop"]


def test_rules_of_every_protocol() -> None:
    world = ("0.0.0.0/0", "::/0")
    rules = (
        Rule("in", "udp", "1024-5000", world, None),
        Rule("in", "icmp", None, world, None),
        Rule("in", "gre", None, ("10.0.0.0/8", "10.1.0.0/16"), None),
        Rule("in", "esp", None, ("::/0",), None),
    )
    assert chain(render_cloud({1: rules}), "in_1")[3:-1] == [
        "ip saddr { 0.0.0.0/0 } udp dport 1024-5000 return",
        "ip6 saddr { ::/0 } udp dport 1024-5000 return",
        "ip saddr { 0.0.0.0/0 } meta l4proto icmp return",
        "ip6 saddr { ::/0 } meta l4proto icmpv6 return",
        "ip saddr { 10.0.0.0/8 } meta l4proto gre return",  # overlapping networks are merged: nft refuses them in a set
        "ip6 saddr { ::/0 } meta l4proto esp return",
    ]


def test_nothing_of_a_rule_but_its_fields_gets_into_the_text() -> None:
    assert "canary" not in render_cloud({1: (Rule("in", "tcp", "22", ("0.0.0.0/0",), 'canary" accept; #'),)})


def make_disk(folder: Path) -> Disk:
    disk = Disk(folder, folder / "base", LocalRunner({}))
    (disk.upper / "mnt" / PROFILE).parent.mkdir(parents=True)
    (disk.upper / "mnt" / PROFILE).symlink_to("/nix/store/system")
    (disk.upper / "etc").mkdir()
    (disk.upper / "etc" / "old").touch()
    return disk


def test_a_disk_is_switched_only_to_an_installed_system(tmp_path: Path) -> None:
    disk = make_disk(tmp_path)
    (disk.upper / "mnt" / PROFILE).unlink()
    assert not disk.switch()
    assert (disk.upper / "etc" / "old").exists()
    assert not disk.installed

    (disk.upper / "mnt" / PROFILE).symlink_to("/nix/store/system")
    assert disk.switch()
    assert disk.installed
    assert not (disk.upper / "etc" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk"]
    assert not disk.switch()


@pytest.mark.parametrize("renames_done", [1, 2])
def test_an_interrupted_switch_is_finished(tmp_path: Path, renames_done: int) -> None:
    disk = make_disk(tmp_path)
    (disk.upper / "mnt").rename(tmp_path / "disk.new")
    if renames_done == 2:
        disk.upper.rename(tmp_path / "disk.old")
    assert disk.switch()
    assert disk.installed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk"]


def test_a_disk_is_not_switched_through_a_link_that_the_guest_made(tmp_path: Path) -> None:
    disk = make_disk(tmp_path)
    (disk.upper / "mnt").rename(tmp_path / "elsewhere")
    (disk.upper / "mnt").symlink_to(tmp_path / "elsewhere")
    assert not disk.switch()
    assert (tmp_path / "elsewhere").is_dir()
    assert (disk.upper / "etc" / "old").exists()


SPEC = MachineSpec(
    7, "alpha", "198.18.17.10", "2001:2:0:110a::/64", "debian-12", ("ssh-ed25519 AAAA one",), "#!/bin/sh\n:\n"
)


def test_a_seed_follows_no_link_of_a_snapshot_and_keeps_its_keys(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "hostname").write_text("the operator's")
    image = tmp_path / "image"
    (image / "root/.ssh").mkdir(parents=True)
    (image / "root/.ssh/authorized_keys").write_text("ssh-ed25519 BBBB two\nssh-ed25519 AAAA one\n")
    (image / "etc").symlink_to(outside)
    (image / "var").symlink_to(outside)
    (image / "srv").mkdir()
    (image / "srv/app").write_text("golden")
    runner = LocalRunner(os.environ)
    disk = Disk(tmp_path / "machine", tmp_path / "base", runner)
    copy_tree(image, tmp_path / "copy", runner)
    disk.make(tmp_path / "copy")
    disk.seed(SPEC)
    assert sorted(path.name for path in outside.iterdir()) == ["hostname"]
    assert (outside / "hostname").read_text() == "the operator's"
    assert (disk.upper / "etc/hostname").read_text() == "alpha\n"
    assert (disk.upper / "srv/app").read_text() == "golden"
    assert (disk.upper / "root/.ssh/authorized_keys").read_text().splitlines() == [
        "ssh-ed25519 BBBB two",
        "ssh-ed25519 AAAA one",
    ]
    first = (disk.upper / "etc/ssh/ssh_host_ed25519_key").read_text()
    disk.seed(SPEC)  # again, over what is there
    assert (disk.upper / "etc/ssh/ssh_host_ed25519_key").read_text() != first


@pytest.mark.parametrize(
    ("user_data", "reason"),
    [
        ("#cloud-config\n- a list\n", "not a mapping"),
        ("#cloud-config\na: [\n", "#cloud-config"),
        ("#cloud-config\nwrite_files: [{path: etc/relative}]\n", "not absolute"),
        ("#cloud-config\nwrite_files: [{content: x}]\n", "no path"),
        ("#cloud-config\nwrite_files: [{path: /x, permissions: 'u=rw'}]\n", "permissions"),
        ("#cloud-config\nwrite_files: [{path: /x, encoding: rot13}]\n", "encoding"),
        ("#cloud-config\nwrite_files: [{path: /x, encoding: gz+b64, content: AAAA}]\n", "write_files"),
        ("#cloud-config\nruncmd: [{a: b}]\n", "neither text nor a list"),
        ("#cloud-config\nruncmd: {a: b}\n", "not a list"),
        ("Content-Type: multipart/mixed\n", "begins with"),
        ("", "begins with"),
    ],
)
def test_user_data_that_cannot_be_carried_out_says_why_at_boot(user_data: str, reason: str) -> None:
    script = first_boot.script(user_data, 7)
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert reason in said.stderr


def test_a_file_that_unpacks_to_more_than_a_disk_is_refused() -> None:
    bomb = base64.b64encode(gzip.compress(bytes(16 * 1024 * 1024))).decode()
    script = first_boot.script(f"#cloud-config\nwrite_files: [{{path: /x, encoding: gz+b64, content: {bomb}}}]\n", 7)
    assert "too large" in script


@pytest.mark.parametrize("name", ["plain", "with space", "it's", "$(touch canary)", "new\nline"])
def test_names_and_content_reach_the_disk_as_they_are(tmp_path: Path, name: str) -> None:
    user = f"{os.geteuid()}:{os.getegid()}"
    path = str(tmp_path / "dir" / name)
    content = "END-OF-CONTENT\n$HOME `id` \\ é\n"
    entry = {"path": path, "content": content, "permissions": "0640", "owner": user}
    again = {**entry, "content": "more", "append": True}
    packed = {"path": f"{path}2", "owner": user, "encoding": "gz+b64", "permissions": 0o600}
    packed["content"] = base64.b64encode(gzip.compress(b"\x00\xff")).decode()
    script = first_boot.script("#cloud-config\n" + yaml.safe_dump({"write_files": [entry, again, packed]}), 7)
    subprocess.run(["sh", "-c", script], check=True, cwd=tmp_path)
    assert Path(path).read_text() == content + "more"
    assert Path(path).stat().st_mode & 0o777 == 0o640
    assert Path(f"{path}2").read_bytes() == b"\x00\xff"
    assert Path(f"{path}2").stat().st_mode & 0o777 == 0o600
    assert [found.name for found in tmp_path.iterdir()] == ["dir"]


def test_the_metadata_are_what_a_data_source_reads() -> None:
    document = yaml.safe_load(metadata.answer("/hetzner/v1/metadata", SPEC) or "")
    assert {"availability-zone", "hostname", "instance-id", "public-ipv4", "local-ipv4", "region"} <= set(document)
    assert {"public-keys", "network-config", "vendor_data"} <= set(document)
    assert document["network-config"]["version"] == 1
    for leaf in ("hostname", "instance-id", "public-ipv4", "private-networks", "availability-zone", "region"):
        assert metadata.answer(f"/hetzner/v1/metadata/{leaf}", SPEC) is not None, leaf
    assert metadata.answer("/hetzner/v1/userdata", SPEC) == SPEC.user_data
    assert metadata.answer("/hetzner/v1/metadata/", SPEC) == metadata.answer("/hetzner/v1/metadata", SPEC)
    for nothing in ("/", "/hetzner", "/hetzner/v1/metadata/hostname/x", "/hetzner/v1/metadata/../userdata"):
        assert metadata.answer(nothing, SPEC) is None, nothing


@pytest.mark.parametrize("rescue", [None, (), ("ssh-ed25519 AAAA one",)])
def test_what_is_asked_of_a_machine_survives_the_daemon(tmp_path: Path, rescue: tuple[str, ...] | None) -> None:
    for rules in (None, (), (SSH,)):
        desired = Desired(SPEC, rules, powered=False, rescue=rescue)
        desired.write(tmp_path / "machine.json")
        assert Desired.read(tmp_path / "machine.json") == desired
    assert (tmp_path / "machine.json").stat().st_mode & 0o777 == 0o600


def test_each_checkout_has_one_number(tmp_path: Path) -> None:
    claims, one, two = tmp_path / "claims", tmp_path / "one", tmp_path / "two"
    runner = RoutesRunner()
    first = claim_number(one, runner, folder=claims)
    assert claim_number(one, runner, folder=claims) == first
    LabRecord(first, one, "/bin").lab_dir.mkdir(parents=True)
    LabRecord(first, one, "/bin").write()
    with pytest.raises(LabError, match=str(one)):
        claim_number(two, runner, wanted=first, folder=claims)
    second = claim_number(two, runner, folder=claims)
    assert second != first
    release_number(first, two, folder=claims)
    assert os.readlink(claims / str(first)) == str(one)
    release_number(first, one, folder=claims)
    release_number(second, two, folder=claims)
    assert not claims.exists()


def test_a_claim_without_a_lab_is_taken_over(tmp_path: Path) -> None:
    claims, gone = tmp_path / "claims", tmp_path / "gone"
    number = claim_number(gone, RoutesRunner(), folder=claims)
    assert claim_number(tmp_path / "new", RoutesRunner(), wanted=number, folder=claims) == number
    assert os.readlink(claims / str(number)) == str(tmp_path / "new")


def test_a_number_whose_addresses_are_in_use_is_left_alone(tmp_path: Path) -> None:
    checkout = Path("/a/checkout")  # fixed: its number is tried first, and the message is about that one
    free = claimable(checkout, RoutesRunner(), folder=tmp_path / "claims")
    assert not (tmp_path / "claims").exists()
    taken = RoutesRunner(f"default via 192.0.2.1 dev eth0\n198.18.{free}.0/24 dev sp0 proto kernel scope link\n")
    assert claimable(checkout, taken, folder=tmp_path / "claims") != free
    vpn = RoutesRunner("local 100.64.3.4 dev tailscale0 table local\n100.64.0.0/10 dev tailscale0 table 52\n")
    with pytest.raises(LabError, match=r"100\.64\.0\.0/10"):
        claimable(checkout, vpn, folder=tmp_path / "claims")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = LabRecord(17, tmp_path, "/bin", "http://127.0.0.1:4000/v1", ProcessId(1, 2))
    assert read_record(record.lab_dir) is None
    record.lab_dir.mkdir(parents=True)
    record.write()
    assert read_record(record.lab_dir) == record
    (record.lab_dir / "lab.json").write_text("{}")
    with pytest.raises(LabError, match="not the record"):
        read_record(record.lab_dir)


def test_a_process_is_known_by_its_start_too() -> None:
    me = ProcessId.of(os.getpid())
    assert me is not None
    assert me.alive()
    assert not ProcessId(me.pid, me.start_ticks + 1).alive()


@pytest.mark.parametrize(
    ("ipv4", "ipv6", "families"), [("198.18.1.10", "", "4"), ("", "2001:2:0:10b::/64", "6"), ("", "", "")]
)
def test_a_leg_has_the_families_that_its_server_has(ipv4: str, ipv6: str, families: str) -> None:
    router, guest = (batch.lines for batch in plan_attach(Addressing(1), 1001, ipv4, ipv6))
    assert [line for line in router if "route add" in line] == [
        *(["route add 198.18.1.10/32 dev s1001"] if ipv4 else []),
        *(["route add 2001:2:0:10b::/64 via fe80::2 dev s1001"] if ipv6 else []),
    ]
    assert ("route add default via 172.31.1.1 dev eth0 onlink" in guest) is ("4" in families)
    assert ("route add ::/0 via fe80::1 dev eth0" in guest) is ("6" in families)
    assert [line for line in guest if line.startswith("address add") and "fe80" not in line] == [
        *(["address add 198.18.1.10/32 dev eth0"] if ipv4 else []),
        *(["address add 2001:2:0:10b::1/64 dev eth0 nodad"] if ipv6 else []),
    ]


def test_a_servers_place_on_the_stand_in_tailnet_is_its_own_while_it_lives() -> None:
    net = Addressing(1)
    assert net.tailnet_key(("198.18.1.12", "2001:2:0:10d::1"), ()) == 12
    assert net.tailnet_key(("198.18.1.12", "2001:2:0:10d::1"), (12,)) == 13
    assert net.tailnet_key(("198.18.1.12",), (10, 12)) == 11
    assert net.tailnet_key((), ()) == 10
