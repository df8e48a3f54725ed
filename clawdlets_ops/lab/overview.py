"""What ``clawdlets lab status`` shows of a lab, as text for people and as JSON. Pure but for ``measure``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from clawdlets_ops.lab.control import LabStatus
from clawdlets_ops.process import Runner
from clawdlets_ops.vantage import Vantage
from clawdlets_ops.verify.exposure import Exposure, measure_exposure

REQUESTS_SHOWN = 10

_TAILNETS = {"real": "the real one", "stand-in": "the stand-in"}

Requests = Sequence[Mapping[str, Any]]


def measure(status: LabStatus, vantages: Sequence[Vantage], runner: Runner) -> dict[str, Exposure]:
    """Who reaches port 22 of each running machine, by name: real connections, a few seconds each."""
    return {
        server.name: measure_exposure(vantages, server.public_addresses, server.tailnet_addresses, runner=runner)
        for server in status.servers
        if server.status == "running"
    }


def text(status: LabStatus, requests: Requests = (), exposures: Mapping[str, Exposure] | None = None) -> str:
    """For people. Without ``exposures`` it says how to have them measured."""
    if status.state != "up":
        more = "; clawdlets lab up mends it, clawdlets lab down clears it away" if status.state == "dead" else ""
        return f"the lab is {status.state}{more}"
    parts = [f"the lab is up (number {status.number}): {status.endpoint}"]
    if (tailnet := status.tailnet) is not None:
        mend = "" if tailnet.works else "; clawdlets lab up mends it"
        parts[0] += f"\nits tailnet is {_TAILNETS.get(tailnet.kind, tailnet.kind)}: {tailnet.evidence}{mend}"
    if status.cut_established:
        parts[0] += "\na change of firewall rules ends the flows that the new rules would not let begin"
    machines = [
        (
            server.name,
            f"{server.status} (rescue)" if server.in_rescue and server.leader_pid else server.status,
            server.ipv4 or "-",
            server.ipv6 or "-",
            " ".join(server.tailnet) or "-",
            "yes" if server.installed else "no",
        )
        for server in status.servers
    ]
    if machines:
        parts.append(columns(("MACHINE", "STATUS", "IPV4", "IPV6", "TAILNET", "INSTALLED"), machines))
    else:
        parts.append("no machines")
    if exposures is None:
        parts.append(f"vantage points: {', '.join(status.vantages)}; --probe measures who reaches port 22")
    for name, exposure in (exposures or {}).items():
        cells: dict[tuple[str, str], dict[int, str]] = {}
        for cell in exposure.cells:
            cells.setdefault((cell.vantage, cell.side), {})[cell.family] = cell.reach
        rows = [(vantage, side, seen.get(4, "-"), seen.get(6, "-")) for (vantage, side), seen in cells.items()]
        title = f"port 22 of {name}, by real connections"
        parts.append(f"{title}\n{columns(('FROM', 'SIDE', 'IPV4', 'IPV6'), rows)}")
    if requests:
        table = columns(("TIME", "METHOD", "PATH", "STATUS", "CHANGES", "CLIENT"), [_row(entry) for entry in requests])
        parts.append(f"last API requests\n{table}")
    return "\n\n".join(parts)


def as_json(
    status: LabStatus, requests: Requests = (), exposures: Mapping[str, Exposure] | None = None
) -> dict[str, Any]:
    """``{state, number, endpoint, tailnet: {kind, works, evidence}, vantages, cutEstablished, machines: [{name, status,
    ipv4, ipv6, tailnet, installed, leaderPid, inRescue, exposure?}], requests: [{ts, method, path, status, userAgent,
    mutates}]}``; ``exposure`` only if it was measured, an address is "" where there is none."""
    machines: list[dict[str, Any]] = []
    for server in status.servers:
        machine: dict[str, Any] = {
            "name": server.name,
            "status": server.status,
            "ipv4": server.ipv4,
            "ipv6": server.ipv6,
            "tailnet": list(server.tailnet),
            "installed": server.installed,
            "leaderPid": server.leader_pid,
            "inRescue": server.in_rescue,
        }
        if exposures is not None and server.name in exposures:
            machine["exposure"] = [asdict(cell) for cell in exposures[server.name].cells]
        machines.append(machine)
    shown = ("ts", "method", "path", "status", "userAgent", "mutates")
    return {
        "state": status.state,
        "number": status.number,
        "endpoint": status.endpoint,
        "tailnet": asdict(status.tailnet) if status.tailnet else None,
        "vantages": list(status.vantages),
        "cutEstablished": status.cut_established,
        "machines": machines,
        "requests": [{key: entry.get(key) for key in shown} for entry in requests],
    }


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, two spaces apart, each column as wide as its widest word."""
    table = [head, *rows]
    widths = [max(len(row[at]) for row in table) for at in range(len(head))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _word(entry.get("ts"))[11:19],
        _word(entry.get("method")),
        _word(entry.get("path")),
        _word(entry.get("status")),
        "yes" if entry.get("mutates") else "-",
        _word(entry.get("userAgent")).partition(" ")[0] or "-",
    )


def _word(value: object) -> str:
    """Printable, of one line and of bounded length: a client writes what it likes into its request."""
    said = "" if value is None else str(value)
    plain = "".join(char if char.isprintable() else "?" for char in said)
    return plain if len(plain) <= 60 else f"{plain[:57]}..."
