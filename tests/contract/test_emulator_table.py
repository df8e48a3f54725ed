"""Debian's hcloud CLI, verb by verb, and python-hcloud, method by method; what came of it is docs/reference/lab-api.md.

CLAWDLETS_WRITE_DOCS=1 writes the table anew; without it the test holds that the committed one is current.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hcloud import APIException, Client
from hcloud.core import BoundModelBase, ResourceClientBase
from hcloud.firewalls import FirewallResource, FirewallResourceLabelSelector, FirewallRule
from hcloud.images import Image
from hcloud.isos import Iso
from hcloud.locations import Location
from hcloud.networks import NetworkRoute, NetworkSubnet
from hcloud.server_types import ServerType
from hcloud.servers import Server, ServerCreatePublicNetwork

from clawdlets_ops.lab.cloud import StubBackend
from tests.contract.emulator_lab import KEY, REPOSITORY, Lab, running_lab
from tests.contract.test_emulator_provider import UNCHANGEABLE, fleet

pytestmark = pytest.mark.contract

DOCUMENT = REPOSITORY / "docs" / "reference" / "lab-api.md"
BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->\n"

# One verb a line, in an order in which each can work. A word after "->" is the error code that is expected.
VERBS = (Path(__file__).parent / "hcloud_verbs.txt").read_text()
RULES = '[{"direction": "in", "protocol": "icmp", "source_ips": ["0.0.0.0/0", "::/0"]}]'


def cli_rows(lab: Lab, program: str, folder: Path) -> list[tuple[str, str]]:
    """Every line of VERBS done: (kind and verb, ``ok`` or the error's code)."""
    (folder / "KEY").write_text(KEY)
    (folder / "RULES").write_text(RULES)
    rows = []
    for line in VERBS.strip().splitlines():
        words, _, expected = line.partition(" -> ")
        argv = [program, "--poll-interval", "10ms", *words.split()]
        done = subprocess.run(
            argv, env=lab.environment(), cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
        code = re.search(r"\(([a-z_]+)[,)]", done.stderr)
        result = "ok" if done.returncode == 0 else code[1] if code else done.stderr.strip()
        assert result == (expected or "ok"), f"{line}\n{done.stdout}\n{done.stderr}"
        rows.append((" ".join(words.split()[:2]), result))
    return list(dict.fromkeys(rows))


IN_SCOPE = (
    "actions",
    "firewalls",
    "images",
    "isos",
    "locations",
    "networks",
    "placement_groups",
    "primary_ips",
    "server_types",
    "servers",
    "ssh_keys",
    "volumes",
)
# Of the client itself and not calls; or, of actions and datacenters, what the API has dropped and refuses.
NO_CALLS = frozenset({"has_id_or_name", "from_dict", "to_dict", "id_or_name", "reload", "model", "data_model"})


class Recorder:
    """Notes every method of python-hcloud's classes in scope that is called, and what there is to call."""

    def __init__(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: dict[str, str] = {}
        self.known: set[str] = set()
        for kind in IN_SCOPE:
            resource = type(getattr(client, kind))
            module = inspect.getmodule(resource)
            bound = [
                found
                for found in vars(module).values()
                if inspect.isclass(found) and issubclass(found, BoundModelBase) and found.__module__ == module.__name__
            ]
            for cls in (resource, *bound):
                for name, method in inspect.getmembers(cls, inspect.isfunction):
                    own = any(name in vars(base) for base in cls.__mro__ if base.__module__.startswith("hcloud."))
                    if name.startswith("_") or name in NO_CALLS or not own:
                        continue
                    label = f"{kind}.{name}" if issubclass(cls, ResourceClientBase) else f"{cls.__name__}.{name}"
                    self.known.add(label)
                    monkeypatch.setattr(cls, name, self._noting(label, method))

    def _noting(self, label: str, method: Any) -> Any:
        @functools.wraps(method)
        def noting(*arguments: Any, **named: Any) -> Any:
            try:
                answer = method(*arguments, **named)
            except APIException as error:
                self.called.setdefault(label, str(error.code))
                raise
            self.called[label] = "ok"
            return answer

        return noting


def python_walk(client: Client) -> None:
    """Every method of every resource in scope, on a resource that can take it."""
    fsn1, x86 = Location(name="fsn1"), ServerType(name="cx23")
    for catalogue, name in (
        (client.locations, "fsn1"),
        (client.server_types, "cx23"),
        (client.isos, "nixos-minimal-25.05-x86_64-linux.iso"),
    ):
        row = catalogue.get_by_name(name)
        assert catalogue.get_by_id(row.id).name == name
        assert catalogue.get_list().meta.pagination.total_entries == len(catalogue.get_all())
    with pytest.warns(DeprecationWarning, match="deprecated"):
        datacenters = client.datacenters
    for call in (datacenters.get_all, datacenters.get_list, lambda: datacenters.get_by_name("fsn1-dc14")):
        with pytest.raises(APIException, match="gone"):
            call()
    with pytest.raises(APIException, match="gone"):
        datacenters.get_by_id(2)
    for listing in (client.actions.get_list, client.actions.get_all):
        with pytest.raises(APIException, match="gone"), pytest.warns(DeprecationWarning, match="deprecated"):
            listing()

    key = client.ssh_keys.create(name="operator", public_key=KEY)
    assert client.ssh_keys.get_by_fingerprint(key.fingerprint).id == key.id
    firewall = client.firewalls.create(name="edge").firewall
    network = client.networks.create(name="home", ip_range="10.0.0.0/16")
    group = client.placement_groups.create(name="apart", type="spread").placement_group
    volume = client.volumes.create(name="data", size=10, location=fsn1).volume
    address = client.primary_ips.create(type="ipv4", name="front", location=fsn1, auto_delete=False).primary_ip
    assert (address.assignee_type, address.assignee_id) == ("unassigned", None)
    created = client.servers.create(
        "web", x86, Image(name="debian-13"), location=fsn1, ssh_keys=[key], volumes=[volume], automount=False
    )
    for action in (created.action, *created.next_actions):
        action.wait_until_finished()
        assert client.actions.get_by_id(action.id).status == "success"
    server = client.servers.get_by_id(created.server.id)
    assert [attached.id for attached in server.volumes] == [volume.id]
    for resource, item in (
        (client.ssh_keys, key),
        (client.firewalls, firewall),
        (client.networks, network),
        (client.placement_groups, group),
        (client.volumes, volume),
        (client.primary_ips, address),
        (client.servers, server),
    ):
        assert resource.get_by_id(item.id).id == resource.get_by_name(item.name).id == item.id
        assert item.id in [row.id for row in resource.get_all()]
        assert item.id in [row.id for row in resource.get_list(name=item.name)[0]]
        assert item.update(name=f"{item.name}2", labels={"a": "b"}).labels == {"a": "b"}
    _walk_network(client, network, server)
    _walk_firewall(firewall, server)
    _walk_volume(volume, server)
    _walk_server(client, server, group, key)
    server.power_off().wait_until_finished()
    client.primary_ips.get_by_id(server.public_net.primary_ipv4.id).unassign().wait_until_finished()
    address.assign(server.id, "server").wait_until_finished()
    address.unassign().wait_until_finished()
    address.change_dns_ptr(address.ip, "front.lab.invalid").wait_until_finished()
    address.change_protection(delete=False).wait_until_finished()
    inner = client.servers.create(
        "inner",
        x86,
        Image(name="debian-13"),
        networks=[network],
        public_net=ServerCreatePublicNetwork(enable_ipv4=False, enable_ipv6=False),
    )
    inner.action.wait_until_finished()
    assert client.servers.get_by_id(inner.server.id).private_net[0].ip == "10.0.1.1"
    assert [member.id for member in client.networks.get_member_all(network)] == [inner.server.id]
    for bound in (server, network, firewall, volume, address, client.images.get_all(type="system")[0]):
        bound.get_actions()
        bound.get_actions_list()
    for item in (inner.server, server):
        item.delete().wait_until_finished()
    for item in (volume, network, firewall, group, address, key):
        assert item.delete() in (True, None)


def _walk_network(client: Client, network: Any, server: Any) -> None:
    subnet = NetworkSubnet(ip_range="10.0.1.0/24", type="cloud", network_zone="eu-central")
    route = NetworkRoute(destination="10.100.1.0/24", gateway="10.0.1.1")
    network.add_subnet(subnet).wait_until_finished()
    network.add_route(route).wait_until_finished()
    network.delete_route(route).wait_until_finished()
    network.change_ip_range("10.0.0.0/12").wait_until_finished()
    server.attach_to_network(network, ip="10.0.1.9").wait_until_finished()
    server.change_alias_ips(network, ["10.0.1.10"]).wait_until_finished()
    assert client.servers.get_by_id(server.id).private_net_for(network).alias_ips == ["10.0.1.10"]
    assert network.get_member_list()[0][0].subnet == "10.0.1.0/24"
    assert network.get_member_all()[0].alias_ips == ["10.0.1.10"]
    server.detach_from_network(network).wait_until_finished()
    network.delete_subnet(subnet).wait_until_finished()
    network.add_subnet(subnet).wait_until_finished()
    network.change_protection(delete=False).wait_until_finished()


def _walk_firewall(firewall: Any, server: Any) -> None:
    rule = FirewallRule(direction="in", protocol="tcp", port="22", source_ips=["10.0.0.0/8"])
    resources = [
        FirewallResource("server", server=Server(id=server.id)),
        FirewallResource("label_selector", label_selector=FirewallResourceLabelSelector("a=b")),
    ]
    for actions in (
        firewall.set_rules([rule]),
        firewall.apply_to_resources(resources),
        firewall.remove_from_resources(resources),
    ):
        for action in actions:
            action.wait_until_finished()


def _walk_volume(volume: Any, server: Any) -> None:
    volume.detach().wait_until_finished()
    volume.attach(server, automount=False).wait_until_finished()
    volume.detach().wait_until_finished()
    volume.resize(20).wait_until_finished()
    volume.change_protection(delete=False).wait_until_finished()


def _walk_server(client: Client, server: Any, group: Any, key: Any) -> None:
    hour = datetime(2026, 11, 22, 10, tzinfo=UTC), datetime(2026, 11, 22, 11, tzinfo=UTC)
    assert server.get_metrics(["cpu", "network"], *hour, step=60).metrics.step == 60
    server.enable_backup().wait_until_finished()
    made = server.create_image(description="before", type="snapshot", labels={"a": "b"})
    made.action.wait_until_finished()
    image = client.images.get_by_id(made.image.id)
    assert (image.status, image.created_from.id) == ("available", server.id)
    assert client.images.get_list(type=["snapshot"]).images[0].id == image.id
    assert client.images.get_by_name_and_architecture("debian-13", "arm").architecture == "arm"
    with pytest.warns(DeprecationWarning, match="deprecated"):
        assert client.images.get_by_name("debian-13").architecture == "x86"
    image.change_protection(delete=True).wait_until_finished()
    image.change_protection(delete=False).wait_until_finished()
    assert image.update(description="after").description == "after"
    server.rebuild(image).action.wait_until_finished()
    server.rebuild(Image(name="debian-13")).action.wait_until_finished()
    assert image.delete()
    server.disable_backup().wait_until_finished()
    server.attach_iso(Iso(name="nixos-minimal-25.05-x86_64-linux.iso")).wait_until_finished()
    server.detach_iso().wait_until_finished()
    server.enable_rescue("linux64", ssh_keys=[key.id]).action.wait_until_finished()
    server.disable_rescue().wait_until_finished()
    assert server.reset_password().root_password
    assert server.request_console().wss_url.startswith("wss://")
    server.change_dns_ptr(server.public_net.ipv4.ip, "web.lab.invalid").wait_until_finished()
    server.change_protection(delete=False, rebuild=False).wait_until_finished()
    server.reboot().wait_until_finished()
    server.reset().wait_until_finished()
    server.shutdown().wait_until_finished()
    server.change_type(ServerType(name="cx33"), upgrade_disk=False).wait_until_finished()
    server.add_to_placement_group(group).wait_until_finished()
    server.remove_from_placement_group().wait_until_finished()
    server.power_on().wait_until_finished()


def provider_rows() -> list[tuple[str, str]]:
    """What test_emulator_provider holds of each resource."""
    rows = []
    for kind, named in fleet(second=True, protected=True).items():
        fixed = all(f"{kind}.{name}" in UNCHANGEABLE for name in named)
        rows.append((kind, "create, read, destroy: ok" if fixed else "create, read, change, destroy: ok"))
    return rows


def document(tables: dict[str, list[tuple[str, str]]]) -> str:
    lines = ["| client | call | result |", "| --- | --- | --- |"]
    for client, rows in tables.items():
        lines += [f"| {client} | `{call}` | {result} |" for call, result in rows]
    return "\n".join(lines) + "\n"


@pytest.fixture
def recorder(client: Client, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(client, monkeypatch)


def test_every_verb_and_every_method_in_scope_as_the_documented_table_says(
    lab: Lab, client: Client, recorder: Recorder, hcloud_program: str, tmp_path: Path
) -> None:
    python_walk(client)
    assert recorder.known - set(recorder.called) == set()
    folder = tmp_path / "cli"
    folder.mkdir()
    with running_lab(folder, StubBackend()) as other:
        tables = {
            "provider 1.68.0": provider_rows(),
            "hcloud CLI (Debian)": cli_rows(other, hcloud_program, folder),
            "python-hcloud": sorted(row for row in recorder.called.items() if row[0][0].islower()),
        }
    wanted = document(tables)
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(BEGIN)
    committed, _, tail = rest.partition(END)
    if os.environ.get("CLAWDLETS_WRITE_DOCS"):
        DOCUMENT.write_text(head + BEGIN + wanted + END + tail)
        return
    assert committed == wanted
