"""The egress policy on a real machine: what gets out, measured from where a bot is, for each mode and on both families.

Destinations are the lab's: web, mail and other listeners in the stranger's namespace, a name server at Hetzner's address in
the lab's internet. The bots' units run an agent that tries what it is told to; other users run it outside any unit.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops import egress
from clawdlets_ops.bots import bot_unit
from clawdlets_ops.hostfiles import data
from clawdlets_ops.lab import control
from clawdlets_ops.lab.addressing import METADATA, RESOLVERS, Addressing
from clawdlets_ops.lab.installer import PATHS
from clawdlets_ops.lab.scenario import Scenario
from tests.lab.conftest import ROOT
from tests.lab.egress_table import Cell, render

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
AGENT = "/usr/local/lib/egress_agent.py"
STATE = "/var/lib/clawdlets/bots"
BOTS = ("free", "maren", "plain", "tight")
MAIL = egress.DROPPED_TCP_PORTS
MODES = ("smtp-only", "proxy-allowlist", "none")
PRINCIPALS = ("bot in its unit", "bot's user outside it", "root", "container")
DOCUMENT = ROOT / "docs" / "reference" / "egress-matrix.md"
Attempt = dict[str, Any]

STATE_OF_THE_UNITS = (
    "systemctl status --no-pager --lines=8 'clawdlets-*' || :; systemctl list-jobs; journalctl -n 60 --no-pager; uptime"
)

CONTAINER = """\
ip netns add box
ip link add box0 type veth peer name eth0 netns box
ip address add 10.88.0.1/24 dev box0
ip -6 address add fd88::1/64 dev box0 nodad
ip link set box0 up
ip -n box address add 10.88.0.2/24 dev eth0
ip -n box -6 address add fd88::2/64 dev eth0 nodad
ip -n box link set eth0 up
ip -n box link set lo up
ip -n box route add default via 10.88.0.1
ip -n box -6 route add default via fd88::1
nft 'table inet box { chain post { type nat hook postrouting priority 100; oifname != "lo" masquerade; }; }'
"""


def fleet(mode: str) -> dict[str, Any]:
    """The example's host with four bots: one as its host, and one for each mode."""
    document = json.loads((ROOT / "fleet" / "clawdlets.json").read_text())
    document.pop("cattle", None)
    host = document["hosts"]["alpha"]
    host["secrets"] = {}
    host["egress"] = {"mode": mode, "allowedDomains": [".allowed.example"]}
    own: dict[str, Any] = {
        "maren": {},
        "plain": {"mode": "smtp-only"},
        "free": {"mode": "none"},
        "tight": {"mode": "proxy-allowlist", "allowedDomains": ["only.tight.example"]},
    }
    host["bots"] = {
        name: {"execStart": f"/usr/bin/python3 {AGENT} serve {STATE}/{name}/agent.sock", "egress": own[name]}
        for name in own
    }
    return document


class Range:
    """One bootstrapped host and what lies outside it."""

    def __init__(self, lab: Scenario) -> None:
        self.lab = lab
        self.net = Addressing(control.status(lab.layout).number)
        self.outside = self.net.outside(2)
        self.mode = ""
        self.asked: list[str] = []
        self._names: subprocess.Popen[str] | None = None

    def sh(self, script: str) -> str:
        return (
            self.lab.guest(
                "alpha", "sh", "-euc", f"PATH=/run/current-system/sw/bin:/usr/sbin:/usr/bin:/sbin:/bin; {script}"
            )
            .check()
            .stdout
        )

    @contextmanager
    def others(self) -> Iterator[None]:
        """The destinations and the name server, as processes of ours in the lab's namespaces."""
        four, six = self.outside
        places = [
            (self.net.stranger_ns, ["serve", four, six]),
            (self.net.internet_ns, ["resolve", RESOLVERS[0], json.dumps(self.records())]),
        ]
        started = []
        try:
            for namespace, words in places:
                argv = ["ip", "netns", "exec", namespace, sys.executable, str(HERE / "egress_outside.py"), *words]
                process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                started.append(process)
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            self._names = started[1]
            yield
        finally:
            for process in started:
                process.kill()
                process.communicate()

    def records(self) -> dict[str, list[Any]]:
        four, six = self.outside
        backwards = ".".join(reversed(four.split(".")))
        return {
            "www.allowed.example": [four, six],
            "allowed.example": [four, six],
            "six.allowed.example": [six],
            "only.tight.example": [four],
            "evil.example": [four],
            "notallowed.example": [four],
            "www.allowed.example.evil.example": [four],
            "rebind.allowed.example": ["127.0.0.1"],
            "rebind6.allowed.example": ["::1"],
            "meta.allowed.example": [METADATA],
            "private.allowed.example": ["10.0.0.1"],
            "tailnet.allowed.example": ["100.64.0.1"],
            "tailnet6.allowed.example": ["fd7a:115c:a1e0::1"],
            "link.allowed.example": ["fe80::1"],
            "both.allowed.example": [four, "10.0.0.1"],
            f"{backwards}.in-addr.arpa": ["www.allowed.example"],
        }

    def questions(self) -> str:
        """Every name that was asked for so far."""
        marker = f"marker-{secrets.token_hex(4)}"
        self.run("root", [{"do": "name", "ask": f"{marker}.example"}])
        assert self._names is not None
        assert self._names.stdout is not None
        while not self.asked or not any(marker in line for line in self.asked[-2:]):
            self.asked.append(self._names.stdout.readline())
        return "".join(self.asked)

    def prepare(self) -> None:
        for name, text in (
            (AGENT, (HERE / "egress_agent.py").read_text()),
            ("/etc/resolv.conf", f"nameserver {RESOLVERS[0]}\n"),
        ):
            self.put(name, text)
        self.sh(CONTAINER)
        # /proc/sys is read-only within the machine.
        leader = control.find_server(self.lab.layout, "alpha").leader_pid
        forward = "for one in ipv4/ip_forward ipv6/conf/all/forwarding; do echo 1 >/proc/sys/net/$one; done"
        subprocess.run(["nsenter", "-t", str(leader), "-n", "sh", "-euc", forward], check=True)

    def put(self, path: str, text: str) -> None:
        argv = control.guest_argv(self.lab.layout, "alpha", ("tee", path))
        subprocess.run(argv, input=text, text=True, stdout=subprocess.DEVNULL, check=True)

    def become(self, mode: str) -> None:
        """Another policy, as an update brings it: files, then units and rules; the proxy and the bots start anew."""
        if mode == self.mode:
            return
        self.lab.layout.fleet_file.write_text(json.dumps(fleet(mode), indent=2))
        host = self.lab.project.fleet.host("alpha")
        for name, text in egress.etc_files(host).items():
            self.put(f"/etc/clawdlets/egress/{name}", text)
        for name, text in egress.units(host, **PATHS).items():
            self.put(f"/etc/systemd/system/{name}", text)
        units = " ".join(bot_unit(name) for name in BOTS)
        self.sh(
            f"systemctl daemon-reload; systemctl reload clawdlets-egress; rm -f {STATE}/*/agent.sock; "
            f"systemctl restart clawdlets-egress-proxy {units}"
        )
        for name in BOTS:
            self.until(f"test -S {STATE}/{name}/agent.sock")
        self.until("ss -Hltn | grep -q 127.0.0.1:3132")
        self.mode = mode

    def until(self, script: str, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.lab.guest("alpha", "sh", "-c", script).ok:
            assert time.monotonic() < deadline, f"{script}\n{self.sh(STATE_OF_THE_UNITS)}"
            time.sleep(0.1)

    def run(self, who: str, attempts: Sequence[Attempt]) -> list[str]:
        """What became of each attempt: ``unit:BOT``, ``container``, or the name of a user outside any unit."""
        if who.startswith("unit:"):
            words = f"python3 {AGENT} ask {STATE}/{who.removeprefix('unit:')}/agent.sock"
        elif who == "container":
            words = f"ip netns exec box python3 {AGENT} once"
        elif who.startswith("cgroup:"):
            unit = bot_unit(who.removeprefix("cgroup:"))
            words = f"sh -c 'echo $$ >/sys/fs/cgroup/system.slice/{unit}/cgroup.procs; exec python3 {AGENT} once'"
        else:
            words = f"setpriv --reuid {who} --regid $(id -g {who}) --init-groups python3 {AGENT} once"
        argv = control.guest_argv(self.lab.layout, "alpha", ("sh", "-euc", words))
        done = subprocess.run(argv, input=json.dumps(list(attempts)), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found: list[str] = json.loads(done.stdout)
        return found

    def counters(self) -> dict[str, int]:
        """Packets by the comment of the rule, and by user for those in the set of the confined."""
        found: dict[str, int] = {}
        for item in json.loads(self.sh("nft -j list table inet clawdlets-egress"))["nftables"]:
            rule = item.get("rule", {})
            for part in rule.get("expr", ()):
                if "counter" in part and "comment" in rule:
                    found[rule["comment"]] = found.get(rule["comment"], 0) + part["counter"]["packets"]
        return found


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Range]:
    with Scenario(fleet("proxy-allowlist"), folder=tmp_path_factory.mktemp("egress"), cache=ROOT / ".cache", environ=os.environ, tailnet="stand-in") as lab:  # fmt: skip
        for stage in ("payload", "provision", "install"):
            lab.deploy(stage, "alpha")
        made = Range(lab)
        made.prepare()
        with made.others():
            yield made


MEASURED: list[Cell] = []


def destinations(outside: tuple[str, str]) -> list[tuple[str, int, Attempt]]:
    """Name of the kind, family, attempt."""
    found = []
    for family, address in zip((4, 6), outside, strict=True):
        found += [("mail", family, {"do": "tcp", "address": address, "port": port}) for port in MAIL]
        found += [
            ("web", family, {"do": "tcp", "address": address, "port": 443}),
            ("other TCP", family, {"do": "tcp", "address": address, "port": 22}),
            ("UDP", family, {"do": "udp", "address": address, "port": 4000}),
            ("DNS", family, {"do": "udp", "address": address, "port": 53}),
        ]
    return [*found, ("metadata", 4, {"do": "tcp", "address": METADATA, "port": 80})]


def should_be(mode: str, who: str, kind: str) -> str:
    """What the security model says of it."""
    if kind == "metadata":
        return "open" if who == "root" else "closed"
    if kind == "mail":
        return "open" if mode == "none" else "closed"
    return "closed" if mode == "proxy-allowlist" and who != "root" else "open"


@pytest.mark.parametrize("mode", ["proxy-allowlist", "smtp-only", "none"])
def test_what_gets_out_is_what_the_mode_says_for_everyone_on_both_families(field: Range, mode: str) -> None:
    field.become(mode)
    tries = destinations(field.outside)
    as_whom = dict(zip(PRINCIPALS, ("unit:maren", "bot-maren", "root", "container"), strict=True))
    surprises = []
    for who, principal in as_whom.items():
        before = field.counters()
        results = field.run(principal, [attempt for _, _, attempt in tries])
        dropped = {name: count - before.get(name, 0) for name, count in field.counters().items()}
        for (kind, family, attempt), result in zip(tries, results, strict=True):
            state = "open" if result == "open" else "closed"
            MEASURED.append(Cell(mode, who, kind, family, state))
            if state != should_be(mode, who, kind):
                surprises.append((mode, who, attempt, result))
        if mode != "none":
            # Both families' mail, each at least once; a closed port elsewhere would count nothing here.
            assert dropped["mail"] >= 2 * len(MAIL), (who, dropped)
        if who != "root":
            assert dropped["metadata"] >= 1 or (mode == "proxy-allowlist" and who == "container"), (who, dropped)
        if mode == "proxy-allowlist" and who.startswith("bot"):
            assert dropped["confined"] >= 1, (who, dropped)
        if mode == "proxy-allowlist" and who == "container":
            assert dropped["forwarded"] >= 1, dropped
    assert surprises == []


def test_the_document_shows_what_was_measured(field: Range) -> None:
    assert {cell.mode for cell in MEASURED} == set(MODES), "the matrix was not measured"
    text = render(MEASURED, MODES, PRINCIPALS)
    if os.environ.get("CLAWDLETS_WRITE_DOCS"):
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text


def test_a_bot_may_differ_from_its_host_either_way(field: Range) -> None:
    four, six = field.outside
    tries = [{"do": "tcp", "address": address, "port": port} for address in (four, six) for port in (443, 25)]
    wanted = {
        ("proxy-allowlist", "plain"): ["open", "closed"] * 2,
        ("proxy-allowlist", "free"): ["open", "open"] * 2,
        ("none", "plain"): ["open", "closed"] * 2,
        ("none", "tight"): ["closed", "closed"] * 2,
    }
    for mode in ("none", "proxy-allowlist"):
        field.become(mode)
        for (of, bot), expected in wanted.items():
            if of == mode:
                for who in (f"unit:{bot}", f"bot-{bot}"):
                    found = ["open" if result == "open" else "closed" for result in field.run(who, tries)]
                    assert found == expected, (mode, who)


def connect(target: str, port: int = 3130) -> Attempt:
    return {"do": "connect", "port": port, "request": f"CONNECT {target}", "tail": f"Host: {target}\r\n"}


def test_the_proxy_lets_through_what_is_on_the_list_and_nothing_else(field: Range) -> None:
    """PXY-04: each request through the bot's own port, from inside its unit."""
    field.become("proxy-allowlist")
    four, six = field.outside
    allowed = (
        "www.allowed.example",
        "WWW.ALLOWED.example",
        "www.allowed.example.",
        "allowed.example",
        "six.allowed.example",
    )
    names = ("rebind", "rebind6", "meta", "private", "tailnet", "tailnet6", "link", "both")
    wanted: dict[str, tuple[Attempt, str]] = {
        f"CONNECT {name}:443": (connect(f"{name}:443"), "200") for name in allowed
    }
    refused = [
        "evil.example:443", "notallowed.example:443", "www.allowed.example.evil.example:443", "www.allowed.example:22",
        "www.allowed.example:25", "www.allowed.example:80", "www.allowed.example:8443", f"{four}:443", f"[{six}]:443", "127.0.0.1:443",
        f"{METADATA}:443", *(f"{name}.allowed.example:443" for name in names),
    ]  # fmt: skip
    wanted |= {f"CONNECT {target}": (connect(target), "403") for target in refused}
    for url, host, status in (
        ("http://www.allowed.example/", "www.allowed.example", "200"),
        ("http://www.allowed.example:25/", "www.allowed.example", "403"),
        ("http://evil.example/", "www.allowed.example", "403"),
        (f"http://{METADATA}/hetzner/v1/userdata", "www.allowed.example", "403"),
        ("http://meta.allowed.example/hetzner/v1/userdata", "meta.allowed.example", "403"),
        ("http://127.0.0.1:3130/squid-internal-mgr/info", "127.0.0.1", "403"),
        ("ftp://www.allowed.example/", "www.allowed.example", "403"),
    ):
        wanted[f"GET {url}"] = (
            {"do": "get", "port": 3130, "request": f"GET {url}", "tail": f"Host: {host}\r\n"},
            status,
        )
    found = dict(zip(wanted, field.run("unit:maren", [attempt for attempt, _ in wanted.values()]), strict=True))
    assert found == {name: status for name, (_, status) in wanted.items()}


def test_the_list_of_a_bot_is_its_own(field: Range) -> None:
    field.become("proxy-allowlist")
    tries = [connect("only.tight.example:443", 3132), connect("www.allowed.example:443", 3132), connect("www.allowed.example:443", 3130), connect("www.allowed.example:443", 3128)]  # fmt: skip
    for who in ("unit:tight", "bot-tight"):
        assert field.run(who, tries) == ["200", "403", "ECONNREFUSED", "ECONNREFUSED"]


def test_a_bots_question_for_a_name_goes_nowhere(field: Range) -> None:
    field.become("proxy-allowlist")
    asked = {who: f"{secrets.token_hex(6)}.canary.example" for who in ("unit:maren", "bot-maren", "unit:plain")}
    for who, name in asked.items():
        field.run(who, [{"do": "name", "ask": name}])
    seen = field.questions()
    assert asked["unit:plain"] in seen  # the log sees such questions
    assert asked["unit:maren"] not in seen
    assert asked["bot-maren"] not in seen


def test_other_ways_out_of_a_confined_unit(field: Range) -> None:
    field.become("proxy-allowlist")
    four, six = field.outside
    port = {name: 7000 + int(field.sh(f"id -u bot-{name}")) % 1000 for name in ("plain", "tight")}
    sideways: list[Attempt] = [
        {"do": "packet"},
        {"do": "raw", "address": four},
        {"do": "raw", "address": six},
        {"do": "tcp", "address": "127.0.0.1", "port": port["tight"]},
        {"do": "tcp", "address": "127.0.0.1", "port": port["plain"]},
        {"do": "tcp", "address": "127.0.0.1", "port": 22},
        {"do": "tcp", "address": "::1", "port": 22},
        {"do": "tcp", "address": "127.0.0.53", "port": 3130},
        {"do": "unix", "path": "/run/dbus/system_bus_socket"},
        {"do": "abstract", "at": "nobody-listens-here"},
    ]
    assert "open" not in field.run("unit:maren", sideways)
    # The controls: what was tried is there for somebody.
    assert (
        field.run("root", [one for one in sideways if one["do"] != "abstract" and one.get("address") != "127.0.0.53"])
        == ["open"] * 8
    )
    assert "open" not in field.run("bot-maren", [one for one in sideways if one["do"] != "unix"])


def test_the_socket_of_tailscale_stays_hidden_when_tailscale_restarts(field: Range) -> None:
    """The lab of this module has no tailscaled: a unit that makes the same socket in the same folder plays it."""
    field.become("proxy-allowlist")
    path = "/run/tailscale/tailscaled.sock"
    program = f"import os, socket, time; s = socket.socket(1); s.bind('{path}'); os.chmod('{path}', 0o666); s.listen(); time.sleep(900)"
    tries = [{"do": "unix", "path": path}]

    def played(keep: str) -> str:
        """What a running bot comes to when such a unit has been stopped and started."""
        for _ in range(2):
            field.sh(
                f"systemctl stop played-tailscaled || :; rm -f {path}; systemd-run -q --collect "
                f'--unit=played-tailscaled -p RuntimeDirectory=tailscale {keep} python3 -c "{program}"'
            )
            field.until(f"test -S {path}")
        assert field.run("root", tries) == ["open"]
        return field.run("unit:maren", tries)[0]

    try:
        assert played(" ".join(f"-p {key}={value}" for key, value in data("tailnet.json")["service"].items())) != "open"
        # The other way round: a folder that goes takes the wall with it.
        assert played("") == "open"
    finally:
        field.sh("systemctl stop played-tailscaled || :; systemctl restart clawdlets-egress")
        field.mode = ""  # The bots start anew, with the wall in its place.


def test_each_wall_holds_without_the_others(field: Range) -> None:
    field.become("proxy-allowlist")
    four, six = field.outside
    web = [{"do": "tcp", "address": address, "port": 443} for address in (four, six)]
    # The cgroup alone: root is not in the set of nftables.
    assert field.run("cgroup:maren", web) == ["timeout", "timeout"]
    assert field.run("cgroup:plain", web) == ["open", "open"]
    # nftables alone: the bot's user is in no cgroup of a bot.
    assert field.run("bot-maren", web) == ["ECONNREFUSED", "ECONNREFUSED"]
    # The proxy's own user, should a name change between the question and the connection.
    inside = [("127.0.0.1", 22), ("::1", 22), (field.net.tailnet(1)[0], 443), (field.net.tailnet(1)[1], 443), (METADATA, 80), ("10.0.0.1", 443)]  # fmt: skip
    tries = [{"do": "tcp", "address": address, "port": port} for address, port in inside]
    assert "open" not in field.run(egress.PROXY_USER, [*tries, {"do": "tcp", "address": four, "port": 22}])
    assert field.run(egress.PROXY_USER, web) == ["open", "open"]


def test_without_the_proxy_a_bot_stays_closed(field: Range) -> None:
    field.become("proxy-allowlist")
    tries = [{"do": "tcp", "address": address, "port": 443} for address in field.outside] + [
        connect("www.allowed.example:443")
    ]
    assert field.run("unit:maren", tries)[-1] == "200"
    field.sh("systemctl stop clawdlets-egress-proxy")
    try:
        found = field.run("unit:maren", tries) + field.run("bot-maren", tries)
        assert not {"open", "200"} & set(found), found
        assert field.sh(f"systemctl is-active {bot_unit('maren')}").strip() == "active"
    finally:
        field.sh("systemctl start clawdlets-egress-proxy; until ss -Hltn | grep -q 127.0.0.1:3132; do sleep 0.1; done")


def test_what_was_denied_is_told_and_what_would_be_is_explained(field: Range) -> None:
    field.become("proxy-allowlist")
    field.run("unit:maren", [connect("told.evil.example:443"), {"do": "tcp", "address": field.outside[0], "port": 443}])
    told = field.lab.run("clawdlets", "egress", "log", "alpha")
    assert told.ok, told.stderr
    assert "told.evil.example" in told.stdout
    assert "maren" in told.stdout
    document = json.loads(field.lab.run("clawdlets", "egress", "log", "alpha", "--json").check().stdout)
    assert any(one["name"] == "told.evil.example" and one["bot"] == "maren" for one in document["denied"])
    assert document["packets"]["confined"] >= 1
    for url, code in (("https://www.allowed.example", 0), ("https://evil.example", 1)):
        explained = field.lab.run("clawdlets", "egress", "explain", "alpha", "--bot", "maren", url)
        assert explained.exit_code == code, explained.stderr
        assert "allowedDomains" in explained.stdout
