"""The lab's commands: up, status, down, reset. Each may be run again at any time, also after the lab's process was killed.

``up`` after such a death takes the leftovers away (processes, namespaces, mounts, never disks), makes the networks anew
and boots the machines that were on again from their disks, at the same addresses and the same endpoint. Besides: the way
into a machine past its network, and what the lab has written down.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import shutil
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import CommandError, LabError
from clawdlets_ops.files import locked
from clawdlets_ops.lab import workplace
from clawdlets_ops.lab.client import USER_AGENT, LabClient
from clawdlets_ops.lab.doctor import require
from clawdlets_ops.lab.headscale import AUTO, choose
from clawdlets_ops.lab.machines import forget_nspawn
from clawdlets_ops.lab.network import Network
from clawdlets_ops.lab.processes import Group, mounts_below, wait_until
from clawdlets_ops.lab.registry import LabRecord, claim_number, read_record, release_number
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, LocalRunner, Runner

UP_TIMEOUT_S = 180.0
GRACE_S = 3.0
LOCK_WAIT_S = 60.0
GUEST_PATH = "/run/current-system/sw/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEPT_BY_RESET = ("keys", "locks")
BOUND_TO_LAB = "the lab"
FIREWALL_ROUTE = "/lab/firewall"


@dataclass(frozen=True)
class LabServer:
    """One server: what the cloud says of it ("" for an address that it has not), and what the lab knows besides.

    ``leader_pid`` is its init's, for nsenter. ``in_rescue``: what runs, or ran last, is the rescue system.
    """

    name: str
    status: str
    ipv4: str
    ipv6: str
    tailnet: tuple[str, ...]
    installed: bool
    leader_pid: int | None
    server_id: int = 0
    in_rescue: bool = False

    @property
    def public_addresses(self) -> dict[int, str]:
        """By address family, those that it has."""
        return {family: address for family, address in ((4, self.ipv4), (6, self.ipv6)) if address}

    @property
    def tailnet_addresses(self) -> dict[int, str]:
        """By address family; empty while the machine is not on the tailnet."""
        return {ipaddress.ip_address(address).version: address for address in self.tailnet}


@dataclass(frozen=True)
class Tailnet:
    """The lab's tailnet: ``kind`` is "real" or "stand-in"; whether all of it works, and what shows that."""

    kind: str
    works: bool
    evidence: str


@dataclass(frozen=True)
class LabStatus:
    """A lab as it is now. ``state`` is up, down (there is none) or dead (its process ended; up and down both mend that)."""

    state: str
    number: int | None = None
    endpoint: str = ""
    servers: tuple[LabServer, ...] = ()
    vantages: tuple[str, ...] = ()
    tailnet: Tailnet | None = None
    cut_established: bool = False


def up(
    layout: Layout, environ: Mapping[str, str], *, tailnet: str = AUTO, cut_established: bool | None = None
) -> LabStatus:
    """One running lab for this checkout, a new one or the one there is; LabError, ToolMissingError.

    ``tailnet``: "real" (headscale and tailscaled), "stand-in", or "auto" for the real one where it is built; a lab keeps
    what it began with. ``cut_established``: whether a change of firewall rules ends the flows that the new rules would not
    let begin; None leaves that as it is (they go on, in a new lab).
    """
    layout = Layout(layout.root.resolve())
    require(layout, environ)
    path = environ.get("PATH", "")
    runner = LocalRunner({"PATH": path, "LANG": "C.UTF-8"})
    workplace.refuse_foreign(layout)
    with _alone(layout):
        record = read_record(layout.lab)
        if record is not None and record.root != layout.root:
            raise LabError(
                f"is a copy of the lab of {record.root}",
                where=str(layout.lab),
                fix="clawdlets lab down here removes the copy and leaves that lab alone",
            )
        if record is not None and tailnet not in (AUTO, record.tailnet):
            raise LabError(
                f"this lab's tailnet is the {record.tailnet}" + (" one" if record.tailnet == "real" else ""),
                where=str(layout.lab),
                fix=f"clawdlets lab down, then clawdlets lab up --tailnet {tailnet}",
            )
        if record is not None and LabClient(record).answers() and _tailnet(LabClient(record)).works:
            workplace.write(layout, record, runner)
            _settle(record, cut_established)
            return status(layout)
        kind = choose(record.tailnet if record else tailnet, layout.cache / "tools", layout.lab / "tailnet", path)
        if record is not None:
            _end_daemon(record)
            _sweep(record, runner)
        number = claim_number(layout.root, runner, wanted=record.number if record else None)
        record = replace(record or LabRecord(number, layout.root, path, tailnet=kind), path=path, daemon=None)
        workplace.prepare(layout, record)
        _start_daemon(record, runner)
        started = read_record(layout.lab)
        if started is None:
            raise LabError("the lab's record is gone", where=str(layout.lab), fix="clawdlets lab up")
        workplace.write(layout, started, runner)
        _settle(started, cut_established)
    return status(layout)


def status(layout: Layout) -> LabStatus:
    """The lab of this checkout as it is now; LabError when its process answers nonsense."""
    layout = Layout(layout.root.resolve())
    record = read_record(layout.lab)
    if record is None or record.root != layout.root:
        return LabStatus("down")
    vantages = tuple(str(entry["name"]) for entry in record.net.vantages())
    client = LabClient(record)
    if not client.answers():
        return LabStatus("dead", record.number, record.endpoint, (), vantages)
    machines = {machine["id"]: machine for machine in client.get("/lab/machines")["machines"]}
    servers = [
        LabServer(
            name=server["name"],
            status=server["status"],
            ipv4=(server["public_net"]["ipv4"] or {"ip": ""})["ip"],
            ipv6=(server["public_net"]["ipv6"] or {"ip": ""})["ip"].replace("::/64", "::1"),
            tailnet=tuple(machines.get(server["id"], {}).get("tailnetAddresses", ())),
            installed=bool(machines.get(server["id"], {}).get("installed", False)),
            leader_pid=machines.get(server["id"], {}).get("leaderPid"),
            server_id=server["id"],
            in_rescue=bool(machines.get(server["id"], {}).get("inRescue", False)),
        )
        for server in _all_servers(client)
    ]
    return LabStatus("up", record.number, record.endpoint, tuple(servers), vantages, _tailnet(client), _cuts(client))


def down(layout: Layout, environ: Mapping[str, str]) -> None:
    """Take the lab of this checkout away, machines, networks and files; nothing to do is fine. LabError.

    Operator keys stay. What is ended is what is on record in the lab's folder: the process by id and start time, the
    machines by their control group, the namespaces by name.
    """
    layout = Layout(layout.root.resolve())
    runner = LocalRunner({"PATH": environ.get("PATH", ""), "LANG": "C.UTF-8"})
    if not layout.runtime.exists():
        return
    with _alone(layout):
        record = read_record(layout.lab)
        if record is not None and record.root == layout.root:  # in a copied checkout it is another's
            _end_daemon(record)
            _sweep(record, runner)
            release_number(record.number, record.root)
        workplace.remove(layout)
        if layout.lab.exists():
            if left := mounts_below(layout.lab):
                raise LabError("is still mounted", where=str(left[0]), fix=f"umount {left[0]}; clawdlets lab down")
            _forget_servers(layout)
            shutil.rmtree(layout.lab)


def _forget_servers(layout: Layout) -> None:
    """What is known here of servers by their ids goes with the cloud: the next lab begins with the same ids."""
    if not layout.bound_to.exists() or layout.bound_to.read_text().strip() != BOUND_TO_LAB:
        return
    runtime = layout.runtime
    for path in (*runtime.glob("known_hosts/*.installer"), *runtime.glob("reports/*/install-receipt.json")):
        path.unlink()
    for name in ("install", "lockdown"):
        if (runtime / name).exists():
            shutil.rmtree(runtime / name)


def reset(layout: Layout, environ: Mapping[str, str]) -> LabStatus:
    """A lab as on the first day: down, all that this runtime dir knew of its machines forgotten, up again.

    Only the operators' keys stay, and the repository's own files (``secrets/``), which belong to no machine. LabError when
    the runtime dir is another environment's, before anything is touched.
    """
    layout = Layout(layout.root.resolve())
    workplace.refuse_foreign(layout)
    bound = layout.bound_to.read_text().strip() if layout.bound_to.exists() else BOUND_TO_LAB
    if bound != BOUND_TO_LAB:
        raise LabError(
            f"this runtime dir belongs to {bound}, not to the lab",
            where=str(layout.bound_to),
            fix="use another checkout for the lab",
        )
    require(layout, environ)  # else it would be down and could not come up
    record = read_record(layout.lab)
    kind = choose(
        record.tailnet if record else AUTO, layout.cache / "tools", layout.lab / "tailnet", environ.get("PATH", "")
    )
    down(layout, environ)
    if layout.runtime.exists():
        with _alone(layout):
            for path in layout.runtime.iterdir():
                if path.name in KEPT_BY_RESET:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    return up(layout, environ, tailnet=kind)


def find_server(layout: Layout, name: str) -> LabServer:
    """The server called ``name``; LabError when the lab is not up, or there is none (with the nearest name)."""
    seen = status(layout)
    if seen.state != "up":
        raise LabError(f"the lab is {seen.state}", where=str(layout.root), fix="clawdlets lab up")
    names = [server.name for server in seen.servers]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise LabError(
            f"there is no machine {name!r} in the lab" + (f"; did you mean {near[0]!r}?" if near else ""),
            where=seen.endpoint,
            fix=f"there are: {', '.join(sorted(names))}" if names else "the lab has no machine yet: bootstrap a host",
        )
    return seen.servers[names.index(name)]


def guest_argv(layout: Layout, name: str, argv: Sequence[str]) -> list[str]:
    """The command line that runs ``argv`` in the machine ``name`` as root, past its network; LabError when it is off.

    It enters the machine's control group first: what is still running there when the machine stops ends with it.
    """
    layout = Layout(layout.root.resolve())
    server = find_server(layout, name)
    if server.leader_pid is None:
        raise LabError(
            f"is {server.status}, and has nothing running to go into",
            where=name,
            fix=f"set -a; . {layout.env_file}; hcloud server poweron {name}",
        )
    record = read_record(layout.lab)
    if record is None:
        raise LabError("the lab's record is gone", where=str(layout.lab), fix="clawdlets lab up")
    group = Group(f"{record.net.prefix}/m{server.server_id}/visitors")
    group.make()
    clean = ["env", "-i", f"PATH={GUEST_PATH}", "HOME=/root", "USER=root", "LANG=C.UTF-8", "TERM=xterm"]
    return group.enter_argv(["nsenter", "-t", str(server.leader_pid), "-a", *clean, *argv])


def console_log(layout: Layout, name: str) -> Path:
    """Where the console of the machine ``name`` is written, over all its boots; LabError."""
    return layout.lab / "machines" / str(find_server(layout, name).server_id) / "console.log"


def log_file(layout: Layout, name: str) -> Path:
    """``journal.jsonl`` (every API request) or ``daemon.log``, also of a dead lab; LabError when there is none."""
    path = layout.lab / name
    if not path.exists():
        raise LabError("the lab is down and has written nothing", where=str(path), fix="clawdlets lab up")
    return path


def requests(layout: Layout, last: int | None = None) -> list[dict[str, Any]]:
    """The API requests on record, oldest first; LabError when there is no record. With ``last`` only so many of the newest,
    and none of those that the lab's own commands make."""
    with log_file(layout, "journal.jsonl").open(encoding="utf-8") as lines:
        if last is None:
            return [json.loads(line) for line in lines]
        own = f'"userAgent": "{USER_AGENT}"'
        return [json.loads(line) for line in deque((line for line in lines if own not in line), maxlen=last)]


def _settle(record: LabRecord, cut_established: bool | None) -> None:
    if cut_established is not None:
        LabClient(record).send("POST", FIREWALL_ROUTE, {"cutEstablished": cut_established})


def _cuts(client: LabClient) -> bool:
    return bool(client.get(FIREWALL_ROUTE)["cutEstablished"])


def _tailnet(client: LabClient) -> Tailnet:
    return Tailnet(**client.get("/lab/tailnet/account"))


def _all_servers(client: LabClient) -> list[dict[str, Any]]:
    found, page = [], 1
    while page:
        answer = client.get(f"/servers?per_page=50&page={page}")
        found += answer["servers"]
        page = answer["meta"]["pagination"]["next_page"]
    return found


def _alone(layout: Layout) -> AbstractContextManager[int]:
    return locked(layout.lock("lab"), what="the lab", wait_s=LOCK_WAIT_S)


def _start_daemon(record: LabRecord, runner: Runner) -> None:
    argv = [sys.executable, "-m", "clawdlets_ops.lab.daemon", "--lab-dir", str(record.lab_dir)]
    command = Command(
        argv, "start the lab", env={"PYTHONPATH": workplace.source_root()}, cwd=Path("/"), timeout_s=UP_TIMEOUT_S
    )
    result = runner.run(command)
    if not result.ok:
        raise LabError(
            f"could not come up: {result.tail()}",
            where=f"lab {record.number}",
            fix=f"see {record.lab_dir / 'daemon.log'}; clawdlets lab down takes away what there is",
        )


def _end_daemon(record: LabRecord) -> None:
    daemon = record.daemon
    if daemon is None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        daemon.signal(number)
        if wait_until(lambda: not daemon.alive(), timeout_s=GRACE_S):
            return
    raise LabError("the lab's process does not end", where=f"process {daemon.pid}", fix="end it, then run again")


def _sweep(record: LabRecord, runner: Runner) -> None:
    """Take away everything of a lab without a process but its files."""
    machines = sorted(path for path in (record.lab_dir / "machines").glob("*") if path.is_dir())
    whole = Group(record.net.prefix)
    whole.signal(signal.SIGTERM, "tailnet")
    for folder in machines:
        whole.signal(signal.SIGTERM, f"m{folder.name}/supervisor")  # systemd-nspawn has the guest power off
    wait_until(lambda: not whole.populated(), timeout_s=GRACE_S)
    whole.kill()
    for folder in machines:
        forget_nspawn(record.net.machine_ns(int(folder.name)), folder / "root")
    for point in mounts_below(record.lab_dir / "machines"):
        try:
            runner.run(Command(["umount", point], "unmount a machine's disk")).check()
        except CommandError as error:
            raise LabError(error.what, where=str(point), fix="end what uses it, then run again") from error
    Network(record.net, runner).sweep()
    whole.remove()
