"""What goes wrong on order, as it is seen from outside, and what the toolkit's bootstrap then does about it.

That is docs/reference/lab-faults.md. CLAWDLETS_WRITE_DOCS=1 writes its table anew; without it the last test holds that the
committed one is current.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hcloud
import pytest
from hcloud import APIException
from hcloud.images.domain import Image
from hcloud.server_types.domain import ServerType
from hcloud.servers.client import BoundServer

from clawdlets_ops import install, load_project, workflow
from clawdlets_ops.errors import LabError, UnreachableError
from clawdlets_ops.lab import control, faults
from clawdlets_ops.lab.control import LabServer
from clawdlets_ops.lab.faults import Injected, parse_fault
from clawdlets_ops.layout import Layout
from clawdlets_ops.lockdown import watchdog
from clawdlets_ops.project import Project
from tests.lab.conftest import ROOT, TAILNET, LabProject, make_project

pytestmark = [pytest.mark.lab, pytest.mark.timeout(420)]

# Fault → whether the first run of the provision stage ends well, and what it says if not.
REFUSALS = {
    "answer 500 POST /servers times=2": (2, "server error"),
    "answer 429 POST /servers times=3": (0, ""),
    "answer resource_unavailable POST /servers times=1": (1, "resource unavailable"),
    "cut POST /servers times=1": (1, "EOF"),
    "lost-answer POST /servers times=1": (1, "EOF"),
    "timeout POST /servers seconds=2 times=1": (1, "EOF"),
    "slow POST /servers seconds=3 times=1": (0, ""),
    "clock-skew api seconds=-86400": (0, ""),
}
API_HOSTS = {f"api{number}": text for number, text in enumerate(REFUSALS)}

DOCUMENT = ROOT / "docs" / "reference" / "lab-faults.md"
BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->\n"
LOCKED = "answer locked POST /firewalls/*/actions/* times=1"
PENDING = "firewall-pending held"
ORDER = (
    *REFUSALS,
    "action create_server times=1",
    LOCKED,
    "sshd-late far seconds=10",
    "latency far milliseconds=20",
    "loss far percent=20",
    "never-boots dead",
    "disk-full full",
    "scan full",
    PENDING,
)
RUNS_IN_THE_RAIN = 4
ROWS: dict[str, tuple[str, str]] = {}  # fault → where the journal names it, and what became of it

CONNECT = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 22), timeout=2) as connection:
        connection.recv(64)
        print("open")
except TimeoutError:
    print("silent")
except OSError:
    print("closed")
"""


@dataclass(frozen=True)
class Site:
    project: LabProject

    @property
    def layout(self) -> Layout:
        return Layout(self.project.root)

    @property
    def client(self) -> hcloud.Client:
        settings = self.project.settings()
        return hcloud.Client(settings["HCLOUD_TOKEN"], api_endpoint=settings["HCLOUD_ENDPOINT"], poll_interval=0.05)

    def inject(self, text: str) -> str:
        return faults.inject(self.layout, parse_fault(text.split())).id

    def clear(self) -> None:
        faults.clear(self.layout)

    def fault(self, ident: str) -> Injected:
        return next(entry for entry in faults.faults(self.layout) if entry.id == ident)

    def server(self, name: str) -> LabServer:
        return next(server for server in control.status(self.layout).servers if server.name == name)

    def guest(self, name: str, script: str) -> subprocess.CompletedProcess[str]:
        argv = ["nsenter", "-t", str(self.server(name).leader_pid), "-a", "sh", "-c", script]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    def look(self, address: str, *, stranger: bool = False) -> tuple[str, float]:
        """How a connection to port 22 ends, and the seconds it took until sshd spoke, the program's start left out."""
        via = ["ip", "netns", "exec", f"clf{control.status(self.layout).number}-out"] if stranger else []
        script = f"import time; start = time.monotonic()\n{CONNECT}\nprint(time.monotonic() - start)"
        argv = [*via, sys.executable, "-S", "-c", script, address]
        state, took = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
        return state, float(took)

    def stage(self, name: str, host: str, *, ok: bool | None = None) -> subprocess.CompletedProcess[str]:
        """One deploy on one host, as a person runs it."""
        return self.project.run(
            "pyinfra", "-y", "inventory/lab.py", f"deploys/{name}.py", "--limit", f"@clawdlets/{host}", ok=ok
        )

    def bound(self, name: str) -> BoundServer:
        found = self.client.servers.get_by_name(name)
        assert found is not None
        return found

    def loaded(self) -> Project:
        return load_project(self.project.root, self.project.env())

    def payload(self, host: str) -> None:
        workflow.apply("payload", self.loaded(), host, workflow.tools_for(self.loaded()))

    def tell(self, text: str, became: str) -> None:
        """A row of the document: ``became``, and the requests that the journal says met the fault."""
        met = [entry for entry in self.project.journal() if entry.get("fault", "").endswith(f": {text}")]
        said = {
            f"`{entry['method']} {re.sub(r'[0-9]+', 'ID', entry['path'].removeprefix('/v1'))}` → "
            + (str(entry["status"]) if entry["status"] else "no answer")
            for entry in met
            # An action may have failed before the answer to what began it: only the asking afterwards is sure to tell.
            if not entry["path"].endswith(faults.ROUTE) and (entry["method"] == "GET" or not text.startswith("action"))
        }
        assert met, text  # at the least the one that put it in
        ROWS[text] = ("<br>".join(sorted(said)), became)

    def servers(self, name: str) -> list[str]:
        return [server.status for server in control.status(self.layout).servers if server.name == name]


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A lab whose fleet has one host per story."""

    def hosts(document: dict[str, Any]) -> None:
        alpha = document["hosts"]["alpha"]
        document["hosts"] = {
            name: copy.deepcopy(alpha) for name in (*API_HOSTS, "unmade", "dead", "full", "far", "held")
        }
        document.pop("cattle", None)  # it names the host that was the only one

    project = make_project(tmp_path_factory.mktemp("faults"))
    project.fleet(hosts)
    commit = ["git", "-C", str(project.root), "-c", "user.name=t", "-c", "user.email=t@example", "commit", "-qam", "f"]
    subprocess.run(commit, check=True, env=project.env())
    try:
        control.up(Layout(project.root), project.env(), tailnet=TAILNET)
        yield Site(project)
    finally:
        control.down(Layout(project.root), os.environ)


@pytest.fixture(scope="module")
def server(site: Site) -> str:
    """A bare server, whose sshd answers."""
    created = site.client.servers.create("bare", ServerType(name="cx23"), Image(name="debian-12"))
    created.action.wait_until_finished()
    until(lambda: site.look(site.server("bare").ipv4)[0] == "open")
    return "bare"


@pytest.fixture(autouse=True)
def _no_fault_stays(site: Site) -> Iterator[None]:
    yield
    site.clear()


class TestEachFaultByItself:
    @pytest.mark.parametrize("family", [4, 6])
    def test_latency_is_added_to_every_round_trip_from_there(self, site: Site, server: str, family: int) -> None:
        address = site.server(server).public_addresses[family]
        site.inject(f"latency {server} milliseconds=300 from=stranger")
        state, far_s = site.look(address, stranger=True)
        assert state == "open"
        assert far_s >= 0.6  # the handshake and the greeting: two round trips
        near_s = min(site.look(address)[1] for _ in range(3))
        assert near_s < 0.3
        site.clear()
        assert min(site.look(address, stranger=True)[1] for _ in range(3)) < 0.3

    def test_loss_is_for_one_vantage_point_and_ends(self, site: Site, server: str) -> None:
        address = site.server(server).ipv6
        site.inject(f"loss {server} percent=100 from=stranger")
        assert (site.look(address, stranger=True)[0], site.look(address)[0]) == ("silent", "open")
        site.clear()
        assert site.look(address, stranger=True)[0] == "open"

    def test_sshd_is_late_after_each_boot_and_latency_follows_through_it(self, site: Site, server: str) -> None:
        address = site.server(server).ipv4
        site.inject(f"sshd-late {server} seconds=4")
        site.inject(f"latency {server} milliseconds=200")
        assert site.look(address)[0] == "open"  # it booted long ago
        started = time.monotonic()
        site.bound(server).reset().wait_until_finished()
        assert site.look(address)[0] == "closed"
        until(lambda: site.look(address)[0] == "open")
        assert time.monotonic() - started >= 3.5
        assert site.look(address)[1] >= 0.4

    def test_a_machine_that_never_boots_is_running_and_silent(self, site: Site, server: str) -> None:
        site.inject(f"never-boots {server}")
        assert site.servers(server) == ["running"]
        assert site.look(site.server(server).ipv4)[0] == "silent"

    def test_a_full_disk_takes_no_byte_and_is_as_before_afterwards(self, site: Site, server: str) -> None:
        ident = site.inject(f"disk-full {server}")
        assert site.guest(server, "echo x >/mnt/x").returncode != 0
        assert "100%" in site.guest(server, "df /var").stdout
        assert "No space left" in site.guest(server, "cp /etc/passwd /root/").stderr
        assert site.guest(server, "cat /root/.ssh/authorized_keys").returncode == 0
        faults.clear(site.layout, ident)
        assert site.guest(server, "echo x >/mnt/x && cat /mnt/x && rm /mnt/x").stdout == "x\n"
        assert "disk-full" not in site.guest(server, "cat /proc/self/mountinfo").stdout

    def test_a_stranger_finds_the_ports_that_are_open(self, site: Site, server: str) -> None:
        ident = site.inject(f"scan {server}")
        until(lambda: site.fault(ident).state.startswith("done"), timeout_s=90)
        said = site.fault(ident).state
        for address in site.server(server).public_addresses.values():
            assert f"{address}: open 22; 65534 refused, 0 silent" in said

    def test_an_action_fails_as_the_api_says_it(self, site: Site, server: str) -> None:
        ident = site.inject("action reboot_server times=1")
        with pytest.raises(hcloud.actions.ActionFailedException, match=ident):
            site.bound(server).reboot().wait_until_finished()

    def test_what_the_lab_refuses_it_says_why(self, site: Site) -> None:
        with pytest.raises(LabError, match="no such server is running"):
            site.inject("scan nobody")
        with pytest.raises(LabError, match="no such fault"):
            faults.clear(site.layout, "f999")
        assert faults.faults(site.layout) == ()

    def test_a_client_sees_the_fault_and_the_labs_own_status_does_not(self, site: Site, server: str) -> None:
        ident = site.inject("answer 503 GET /servers*")
        with pytest.raises(APIException, match="unavailable"):
            site.client.servers.get_all()
        assert site.servers(server)
        assert site.fault(ident).hits == 1


class TestWhatBootstrapDoes:
    @pytest.mark.parametrize("host", API_HOSTS, ids=[text.replace(" ", "-") for text in API_HOSTS.values()])
    def test_refused_or_cut_off_it_says_so_and_a_rerun_makes_one_server(self, site: Site, host: str) -> None:
        text = API_HOSTS[host]
        failures, says = REFUSALS[text]
        site.payload(host)
        ident = site.inject(text)
        for _ in range(failures):
            run = site.stage("provision", host, ok=False)
            assert says in run.stdout
            assert "run again" in run.stdout
            assert "Traceback" not in run.stdout
        site.stage("provision", host, ok=True)
        assert site.fault(ident).state == ("spent" if "times=" in text else "armed")
        assert site.servers(host) == ["running"]
        accepted = [
            entry
            for entry in site.project.journal()
            if entry["path"] == "/v1/servers" and entry["status"] == 201 and entry["body"]["name"] == host
        ]
        assert len(accepted) == 1
        often = ("", "once", "twice")[failures]
        ended = f"Provision ends {often} with *{says}*; the next run" if failures else "Provision"
        site.tell(text, f"{ended} ends well, with the one server.")

    def test_a_server_whose_creation_failed_is_not_taken_for_one(self, site: Site) -> None:
        site.payload("unmade")
        site.inject("action create_server times=1")
        first = site.stage("provision", "unmade", ok=False)
        assert "create_server failed" in first.stdout
        again = site.stage("provision", "unmade", ok=False)
        assert "the server exists" in again.stdout
        assert "delete it there" in again.stdout
        text = "action create_server times=1"
        site.tell(text, "Provision ends with *create_server failed*; so does each re-run: delete the server first.")

    def test_a_server_that_never_boots_is_given_up_with_what_to_look_at(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site.payload("dead")
        site.inject("never-boots dead")
        site.stage("provision", "dead", ok=True)  # the API says that it runs
        monkeypatch.setattr(install, "FIRST_CONTACT_S", 4.0)  # 300 s in production
        project = site.loaded()
        with pytest.raises(UnreachableError) as caught:
            workflow.apply("install", project, "dead", workflow.tools_for(project))
        assert "first contact with dead: no SSH server answered within 4 s" in str(caught.value)
        assert "look at the server's console" in str(caught.value)
        assert site.servers("dead") == ["running"]
        site.tell(
            "never-boots dead", "Provision ends well, as the API says *running*; the installation gives up after 300 s."
        )

    def test_a_full_disk_stops_the_installation_with_the_reason_and_a_rerun_goes_on(self, site: Site) -> None:
        site.inject("disk-full full")
        run = site.stage("bootstrap", "full", ok=False)
        assert "No space left on device" in run.stdout
        assert "run again: the installation goes on" in run.stdout
        assert "Traceback" not in run.stdout
        site.clear()
        scanned = site.inject("scan full")  # and a stranger tries every door meanwhile
        site.stage("bootstrap", "full", ok=True)
        assert site.servers("full") == ["running"]
        until(lambda: site.fault(scanned).state.startswith("done"), timeout_s=120)
        assert "open 22" not in site.fault(scanned).state  # the edge lets in the operator alone
        site.tell(
            "disk-full full",
            "Bootstrap ends with *No space left on device*; with room again, the next run ends verified.",
        )
        site.tell("scan full", "Bootstrap ends verified, and the scan found no port 22.")

    @pytest.mark.long
    @pytest.mark.timeout(900)
    def test_late_far_lossy_and_locked_it_gets_there_by_running_again(self, site: Site) -> None:
        late, far, loss, locked = (
            "sshd-late far seconds=10",
            "latency far milliseconds=20",
            "loss far percent=20",
            LOCKED,
        )
        idents = {text: site.inject(text) for text in (late, far, loss, locked)}
        said = []
        for _ in range(RUNS_IN_THE_RAIN):  # and it does not stop
            run = site.stage("bootstrap", "far")
            said.append(run.stdout)
            if run.returncode == 0:
                break
            assert "Traceback" not in run.stdout
        assert run.returncode == 0, said
        assert site.servers("far") == ["running"]
        assert site.fault(idents[locked]).hits == 1
        assert any(re.search(r"rolled back, because .*\n.*locked \(fault", text) for text in said)
        assert len([entry for entry in site.project.journal() if entry["method"] == "POST" and entry["status"] == 201
                    and entry["path"] == "/v1/servers" and entry["body"]["name"] == "far"]) == 1  # fmt: skip
        site.tell(locked, "Lockdown is rolled back, with the reason; a re-run locks down.")
        lasting = (
            f"lasted for the whole bootstrap, on both networks: verified within {RUNS_IN_THE_RAIN} runs, one server."
        )
        for text in (far, loss):
            site.tell(text, f"It {lasting}")
        site.tell(late, "Waited for, together with latency and loss.")
        site.clear()
        address = next(iter(site.server("far").tailnet_addresses.values()))
        near_s = min(site.look(address)[1] for _ in range(3))
        site.inject("latency far milliseconds=600 from=operator-tailnet")
        state, far_s = site.look(address)
        assert (state, far_s >= near_s + 1.0) == ("open", True)  # two round trips, over the tailnet

    @pytest.mark.long
    @pytest.mark.timeout(900)
    def test_a_firewall_that_stays_pending_is_put_back_and_a_rerun_locks_down(self, site: Site) -> None:
        for stage in ("payload", "provision", "install"):
            site.stage(stage, "held", ok=True)
        site.inject(PENDING)
        failed = site.stage("lockdown", "held", ok=False).stdout
        assert "pending" in failed
        assert "THE EDGE COULD NOT BE OPENED AGAIN" in failed  # nobody could see it applied
        assert site.look(site.server("held").ipv4)[0] == "open"
        site.clear()
        until(lambda: not watchdog.lives(site.layout, "held"), timeout_s=180)
        site.stage("bootstrap", "held", ok=True)
        assert site.look(site.server("held").ipv4)[0] != "open"
        site.tell(
            PENDING,
            "Lockdown waits, puts the old rules back and says that nobody saw them applied; they let SSH in again. Once it is "
            "over, the next run goes on and ends verified.",
        )

    @pytest.mark.timeout(900)
    def test_many_hosts_at_once_and_a_second_run_costs_next_to_nothing(self, site: Site) -> None:
        hosts = [host for host, text in API_HOSTS.items() if text.split()[0] in ("answer", "lost-answer")][:3]
        site.inject("clock-skew api seconds=-86400")
        first = site.project.run("clawdlets", "bootstrap", *hosts)
        assert len(re.findall(r"^api[0-9]+ +changed +verify ", first.stdout, flags=re.MULTILINE)) == len(hosts)
        before, logins = len(site.project.journal()), {host: self.logins(site, host) for host in hosts}
        second = site.project.run("clawdlets", "bootstrap", *hosts)
        assert len(re.findall(r"^api[0-9]+ +unchanged +verify ", second.stdout, flags=re.MULTILINE)) == len(hosts)
        asked = [entry for entry in site.project.journal()[before:] if "/lab/" not in entry["path"]]
        assert len(asked) <= 6, asked  # for all hosts together
        assert not any(entry["mutates"] for entry in asked)
        run = json.loads(site.project.run("clawdlets", "runs", "show", "--json").stdout)
        assert {stage["state"] for host in run["hosts"].values() for stage in host["stages"]} == {"unchanged", "done"}
        folder = site.layout.runs / run["id"]
        logs = "".join(path.read_text() for path in folder.glob("*.log"))
        assert "$ tofu" not in logs
        assert (folder / "report.html").is_file()
        for host in hosts:
            assert self.logins(site, host) - logins[host] == 1  # the verification, which the lockdown's plan looks at

    def logins(self, site: Site, host: str) -> int:
        said = site.guest(host, "journalctl --no-pager -u ssh -u sshd | grep -c 'Accepted publickey for admin'").stdout
        return int(said)


def test_the_document_is_as_it_was_seen_here() -> None:
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(BEGIN)
    current, _, tail = rest.partition(END)
    known = {line.split("`")[1]: line for line in current.splitlines() if line.startswith("| `")}
    seen = {text: f"| `{text}` | {met or 'put in, taken away'} | {became} |" for text, (met, became) in ROWS.items()}
    if os.environ.get("CLAWDLETS_WRITE_DOCS"):
        known |= seen
        lines = ["| fault | in the request journal | what the toolkit did |", "| --- | --- | --- |"]
        lines += [known[text] for text in ORDER if text in known]
        DOCUMENT.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + tail)
    else:
        assert list(known) == list(ORDER)
        assert seen == {text: known[text] for text in seen}, "CLAWDLETS_WRITE_DOCS=1 writes it anew"
