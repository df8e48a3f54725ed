"""The machine backend by itself: first boot, metadata, rescue, snapshots, console, cut flows."""

from __future__ import annotations

import base64
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml

from clawdlets_ops.lab.addressing import Addressing
from clawdlets_ops.lab.backend import AddressingBackend, BackendError, MachineSpec, RescueBackend, Rule, SnapshotBackend
from clawdlets_ops.lab.machines import Machines
from clawdlets_ops.lab.network import Network, in_namespace
from clawdlets_ops.lab.processes import Group, mounts_below
from clawdlets_ops.lab.registry import claim_number, release_number
from clawdlets_ops.process import Command, LocalRunner, Result

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

BASE = Path(__file__).parents[2] / ".cache" / "lab" / "base"
RUNNER = LocalRunner(os.environ)
WITHIN_S = 30.0

GET = """
import socket, sys
with socket.create_connection(("169.254.169.254", 80), timeout=3) as connection:
    connection.sendall(f"GET {sys.argv[1]} HTTP/1.0\\r\\n\\r\\n".encode())
    answer = b""
    while part := connection.recv(4096):
        answer += part
head, _, body = answer.partition(b"\\r\\n\\r\\n")
sys.stdout.write(head.split()[1].decode() + "\\n" + body.decode())
"""


@dataclass
class Rig:
    """A network and machines of its own, driven as the emulated cloud does it."""

    folder: Path
    network: Network
    machines: Machines
    down: list[int] = field(default_factory=list)
    _next: int = 0

    def spec(self, **more: object) -> MachineSpec:
        server_id, (ipv4, ipv6) = 5001 + self._next, self.network.net.allocate(self._next)
        self._next += 1
        spec = MachineSpec(server_id, f"m{server_id}", ipv4, ipv6, "debian-12", (self.public_key,), "")
        return replace(spec, **more)  # type: ignore[arg-type]

    def create(self, rules: tuple[Rule, ...] | None = None, **more: object) -> MachineSpec:
        spec = self.spec(**more)
        self.machines.create(spec, rules)
        return spec

    @property
    def key(self) -> Path:
        return self.folder / "key"

    @property
    def public_key(self) -> str:
        return self.key.with_suffix(".pub").read_text().strip()

    def ssh(self, spec: MachineSpec, script: str) -> Result:
        return ssh(self.key, spec.ipv4, script)

    def wait_for_ssh(self, spec: MachineSpec) -> None:
        eventually(lambda: self.ssh(spec, "true").ok, "ssh")

    def inside(self, spec: MachineSpec, script: str, *, user: str = "root") -> str:
        """What a shell says that no firewall keeps out."""
        state = next(state for state in self.machines.states() if state.server_id == spec.server_id)
        argv = ["nsenter", "-t", str(state.leader_pid), "-a", "setpriv", f"--reuid={user}", "--clear-groups"]
        return RUNNER.run(Command([*argv, "sh", "-c", script], "look inside", timeout_s=40)).check().stdout

    def get(self, spec: MachineSpec, path: str, *, user: str = "root") -> tuple[int, str]:
        status, _, body = self.inside(spec, f"python3 -c '{GET}' {path}", user=user).partition("\n")
        return int(status), body

    def state(self, spec: MachineSpec) -> tuple[bool, bool]:
        """Whether it runs, and whether in rescue."""
        return next((s.running, s.in_rescue) for s in self.machines.states() if s.server_id == spec.server_id)


def ssh(key: Path, address: str, script: str) -> Result:
    words = [
        f"-o{word}"
        for word in ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes")
    ]
    argv = ["ssh", *words, "-oConnectTimeout=5", "-i", key, f"root@{address}", script]
    return RUNNER.run(Command(argv, "ask the machine", timeout_s=40))


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {WITHIN_S:g} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("rig")
    number = claim_number(folder, RUNNER)
    network = Network(Addressing(number), RUNNER)
    down: list[int] = []
    machines = Machines(
        folder / "machines", base=BASE, network=network, runner=RUNNER, path=os.environ["PATH"], on_down=down.append
    )
    RUNNER.run(Command(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], "make a key")).check()
    try:
        network.up()
        machines.resume()
        yield Rig(folder, network, machines, down)
    finally:
        for state in machines.states():
            machines.delete(state.server_id)
        machines.close()
        network.sweep()
        Group(network.net.prefix).remove()
        left = [*mounts_below(folder), *network.leftovers(), *Path("/run/systemd/nspawn").glob(f"*/clf{number}-*")]
        release_number(number, folder)
        assert left == []


@pytest.fixture
def spec(rig: Rig) -> Iterator[MachineSpec]:
    """A machine of a cloud-config, that no firewall protects."""
    content = base64.b64encode(b"canary\x00binary").decode()
    user_data = f"""#cloud-config
write_files:
  - path: /etc/app/one.conf
    content: "with 'quotes' $(and) more\\n"
    permissions: '0640'
    owner: root:adm
  - {{path: /opt/two, encoding: b64, content: {content}, permissions: 0600}}
runcmd:
  - echo $((6 * 7)) > /run/answer
  - [sh, -c, 'echo "$0" >> /var/runs', 'one word']
packages: [cowsay]
"""
    made = rig.create(user_data=user_data)
    try:
        rig.wait_for_ssh(made)
        yield made
    finally:
        rig.machines.delete(made.server_id)


def finished(rig: Rig, spec: MachineSpec) -> None:
    marker = f"/var/lib/cloud/instances/{spec.server_id}/boot-finished"
    eventually(lambda: rig.ssh(spec, f"test -e {marker}").ok, "the first boot's work")


def test_user_data_is_carried_out_once(rig: Rig, spec: MachineSpec) -> None:
    finished(rig, spec)
    said = rig.ssh(spec, "stat -c '%a %U %G' /etc/app/one.conf /opt/two; cat /etc/app/one.conf /run/answer /var/runs")
    assert said.stdout.splitlines() == [
        "640 root adm",
        "600 root root",
        "with 'quotes' $(and) more",
        "42",
        "one word",
    ]
    assert rig.ssh(spec, "base64 /opt/two").stdout.strip() == base64.b64encode(b"canary\x00binary").decode()
    assert "does not carry out: packages" in rig.ssh(spec, "cat /var/log/cloud-init-output.log").stdout
    assert rig.ssh(spec, "systemctl is-system-running --wait").stdout == "running\n"
    assert rig.ssh(spec, "cat /var/lib/cloud/seed/nocloud/meta-data").stdout.splitlines() == [
        f"instance-id: {spec.server_id}",
        f"local-hostname: {spec.name}",
    ]

    rig.machines.reboot(spec.server_id, hard=False)
    rig.wait_for_ssh(spec)
    assert rig.ssh(spec, "systemctl is-system-running --wait").stdout == "running\n"
    assert rig.ssh(spec, "cat /var/runs; ls /run/answer").stdout == "one word\n"


def test_every_process_reads_the_metadata_whatever_the_firewall_says(rig: Rig, spec: MachineSpec) -> None:
    nothing_out = (Rule("out", "tcp", "9", ("192.0.2.1/32",), None),)
    for rules in (None, (), nothing_out):
        rig.machines.set_rules(spec.server_id, rules)
        status, body = rig.get(spec, "/hetzner/v1/metadata", user="nobody")
        found = yaml.safe_load(body)
        assert (status, found["hostname"], found["instance-id"]) == (200, spec.name, spec.server_id)
    assert found["public-ipv4"] == spec.ipv4
    assert found["public-keys"] == [rig.public_key]
    assert found["network-config"]["config"][0]["subnets"][1]["address"] == spec.ipv6_network.replace("::/", "::1/")
    assert rig.get(spec, "/hetzner/v1/userdata", user="nobody") == (200, spec.user_data)
    leaves = {
        name: rig.get(spec, f"/hetzner/v1/metadata/{name}") for name in ("hostname", "instance-id", "public-ipv4")
    }
    assert leaves == {
        "hostname": (200, spec.name),
        "instance-id": (200, str(spec.server_id)),
        "public-ipv4": (200, spec.ipv4),
    }
    for path in ("/", "/hetzner/v1", "/hetzner/v1/metadata/nothing", "/latest/meta-data"):
        assert rig.get(spec, path)[0] == 404, path
    # Who is no server gets nothing at all, and the operator's own metadata address is left alone.
    look = ["ip", "netns", "exec", rig.network.net.stranger_ns, "timeout", "1", "bash", "-c"]
    assert not RUNNER.run(Command([*look, "echo > /dev/tcp/169.254.169.254/80"], "look from outside")).ok
    route = RUNNER.run(Command(["ip", "route", "get", "169.254.169.254"], "the root namespace's way")).stdout
    assert rig.network.net.operator_legs[0] not in route


def test_a_script_runs_and_one_that_cannot_be_taken_says_why(rig: Rig) -> None:
    packed = base64.b64encode(b"#!/bin/sh\necho ran as $(id -un)\nexit 3\n").decode()
    script, refused = rig.create(user_data=packed), rig.create(user_data="#include\nhttp://192.0.2.1/\n")
    for spec, output in ((script, "ran as root"), (refused, "begins with #! or #cloud-config")):
        rig.wait_for_ssh(spec)
        finished(rig, spec)
        assert output in rig.ssh(spec, "cat /var/log/cloud-init-output.log").stdout
        # As with cloud-init, a failure is seen in the unit, and the server is there.
        assert rig.ssh(spec, "systemctl is-system-running --wait").stdout == "degraded\n"
        rig.machines.delete(spec.server_id)


def test_a_rescue_is_one_boot_with_the_disk_at_hand(rig: Rig, spec: MachineSpec) -> None:
    backend: RescueBackend = rig.machines
    assert isinstance(backend, AddressingBackend)
    rig.ssh(spec, "echo of the disk > /var/kept; rm /root/.ssh/authorized_keys; sync").check()
    assert not rig.ssh(spec, "true").ok
    backend.enable_rescue(spec.server_id, (rig.public_key,))
    assert rig.state(spec) == (True, False)
    rig.machines.reboot(spec.server_id, hard=True)
    rig.wait_for_ssh(spec)
    assert rig.state(spec) == (True, True)
    said = rig.ssh(spec, "hostname; cat /mnt/disk/var/kept; ls /var/kept").stdout.splitlines()
    assert said == ["rescue", "of the disk"]
    rig.ssh(spec, "cp /root/.ssh/authorized_keys /mnt/disk/root/.ssh/; touch /var/of-the-rescue").check()

    rig.ssh(spec, "systemctl reboot")
    eventually(lambda: rig.state(spec) == (True, False), "the boot from the disk")
    rig.wait_for_ssh(spec)
    assert rig.ssh(spec, "hostname; cat /var/kept; ls /var/of-the-rescue").stdout.splitlines() == [
        spec.name,
        "of the disk",
    ]

    backend.enable_rescue(spec.server_id, (rig.public_key,))
    backend.disable_rescue(spec.server_id)
    rig.machines.reboot(spec.server_id, hard=True)
    rig.wait_for_ssh(spec)
    assert rig.state(spec) == (True, False)
    assert rig.ssh(spec, "hostname").stdout.strip() == spec.name


def test_an_image_makes_servers_that_are_their_own(rig: Rig, spec: MachineSpec) -> None:
    backend: SnapshotBackend = rig.machines
    finished(rig, spec)
    # A folder of the base that is removed and made again hides the base's: that is an attribute, and must be copied too.
    rig.ssh(spec, "rm -r /usr/share/zoneinfo /srv; mkdir /srv; echo golden > /srv/app").check()
    rig.ssh(
        spec, "rm -r /etc/cron.daily; mkdir /etc/cron.daily; mv /var/log /var/elsewhere; ln -s /etc /var/log"
    ).check()
    backend.create_image(spec.server_id, 9001)
    rig.ssh(spec, "echo later > /srv/app").check()

    public = rig.public_key.replace("root@", "other@")
    copy = rig.create(
        image="9001", authorized_keys=(public,), user_data="#cloud-config\nruncmd: [echo new >> /var/runs]\n"
    )
    rig.wait_for_ssh(copy)
    finished(rig, copy)
    said = rig.ssh(
        copy, "hostname; cat /srv/app /var/runs; ls /etc/cron.daily; ls -d /usr/share/zoneinfo /var/log/hostname"
    )
    assert said.stdout.splitlines() == [copy.name, "golden", "one word", "new", "/var/log/hostname"]
    keys = [rig.ssh(each, "cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub").stdout for each in (spec, copy)]
    assert len(set(keys)) == 2

    backend.delete_image(9001)
    backend.delete_image(9001)
    assert rig.ssh(copy, "cat /srv/app").stdout == "golden\n"
    with pytest.raises(BackendError, match="no image 9001"):
        rig.machines.rebuild(copy, None)
    assert rig.ssh(copy, "cat /srv/app").stdout == "golden\n", "a rebuild that cannot be leaves the server as it is"
    rig.machines.rebuild(replace(copy, image="debian-12"), None)
    rig.wait_for_ssh(copy)
    assert rig.ssh(copy, "ls /srv").stdout == ""
    rig.machines.delete(copy.server_id)


def test_a_guest_that_powers_itself_off_is_reported_and_its_console_kept(rig: Rig, spec: MachineSpec) -> None:
    rig.ssh(spec, "echo canary-on-the-console > /dev/console").check()
    before = rig.down.count(spec.server_id)
    rig.ssh(spec, "systemctl poweroff")
    eventually(lambda: rig.state(spec) == (False, False), "power off")
    assert rig.down.count(spec.server_id) == before + 1
    assert "canary-on-the-console" in rig.machines.console(spec.server_id).read_text(errors="replace")
    with pytest.raises(BackendError):
        rig.machines.console(1)


@pytest.mark.parametrize("cut", [False, True])
def test_established_flows_are_cut_when_the_lab_says_so(rig: Rig, spec: MachineSpec, *, cut: bool) -> None:
    net = rig.network.net
    everybody = Rule("in", "tcp", "4000", ("0.0.0.0/0",), None)
    rig.machines.set_rules(spec.server_id, (everybody,))
    rig.machines.cut_established(cut)
    listener = in_namespace(net.machine_ns(spec.server_id), lambda: socket.create_server((spec.ipv4, 4000)))
    try:
        with in_namespace(net.stranger_ns, lambda: socket.create_connection((spec.ipv4, 4000), timeout=5)) as client:
            server, _ = listener.accept()
            with server:
                server.settimeout(1.5)
                client.sendall(b"before")
                assert server.recv(16) == b"before"
                rig.machines.set_rules(spec.server_id, ())
                client.sendall(b"after")
                if cut:
                    with pytest.raises(TimeoutError):
                        server.recv(16)
                else:
                    assert server.recv(16) == b"after"
        # What the server itself begins goes on in both cases.
        assert rig.get(spec, "/hetzner/v1/metadata/hostname")[0] == 200
        control = f"bash -c 'head -c 9 < /dev/tcp/{net.outside(2)[0]}/4001'"
        outside = in_namespace(net.stranger_ns, lambda: socket.create_server((net.outside(2)[0], 4001)))
        with outside:
            outside.settimeout(5)
            rig.inside(spec, f"timeout 5 {control} > /run/said 2>&1 &")
            peer, _ = outside.accept()
            with peer:
                peer.sendall(b"a talk on")
            eventually(lambda: rig.inside(spec, "cat /run/said") == "a talk on", "the answer")
    finally:
        listener.close()
        rig.machines.cut_established(False)
