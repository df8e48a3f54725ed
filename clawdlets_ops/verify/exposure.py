"""Who reaches port 22 of a host: measured by real connections, from every vantage, on both address families.

Three values: yes, no, unknown. A port that does not open counts as closed only when the same vantage, in the same run,
has just reached its positive control on the same family; otherwise nothing is known.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.process import Command, Runner
from clawdlets_ops.vantage import Vantage

SSH_PORT = 22
FAMILIES = (4, 6)
PROBE_TIMEOUT_S = 30.0

Reach = Literal["yes", "no", "unknown"]
_SEEN_AS: dict[str, Reach] = {"open": "yes", "refused": "no", "filtered": "no"}


@dataclass(frozen=True)
class Cell:
    """One vantage, one family: whether port ``port`` of ``address`` was reached. ``detail`` says what was seen."""

    vantage: str
    side: str
    family: int
    address: str
    port: int
    reach: Reach
    detail: str = ""


@dataclass(frozen=True)
class Exposure:
    """What was measured, in the order of vantages, IPv4 before IPv6."""

    cells: tuple[Cell, ...]

    def open_from_internet(self) -> tuple[str, ...]:
        """Where the port is reached from the internet side, in words; empty when nowhere as far as was seen."""
        return tuple(_place(cell) for cell in self.cells if cell.side == "internet" and cell.reach == "yes")

    def closed_from_tailnet(self) -> tuple[str, ...]:
        """Where the port is not reached from the tailnet side, in words."""
        return tuple(_place(cell) for cell in self.cells if cell.side == "tailnet" and cell.reach == "no")

    def unknown(self) -> tuple[str, ...]:
        """Where it could not be seen, in words."""
        return tuple(f"{_place(cell)}: {cell.detail}" for cell in self.cells if cell.reach == "unknown")

    def text(self) -> str:
        """A table for people: a row a vantage, a column a family."""
        by_vantage: dict[tuple[str, str], dict[int, str]] = {}
        for cell in self.cells:
            by_vantage.setdefault((cell.vantage, cell.side), {})[cell.family] = cell.reach
        rows = [("vantage", "side", "IPv4", "IPv6")]
        rows += [(name, side, seen.get(4, "-"), seen.get(6, "-")) for (name, side), seen in by_vantage.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def __str__(self) -> str:
        return self.text()

    def as_json(self) -> dict[str, Any]:
        """JSON-able form: ``{"cells": [{vantage, side, family, address, port, reach, detail}]}``."""
        return {"cells": [asdict(cell) for cell in self.cells]}


@dataclass(frozen=True)
class Sight:
    """What is to be looked at of one host: its addresses on both sides by family, the SSH port, and other ports of its
    public addresses."""

    public: Mapping[int, str]
    tailnet: Mapping[int, str]
    port: int = SSH_PORT
    others: tuple[int, ...] = ()

    def targets(self, side: str) -> list[tuple[int, str, int]]:
        """(family, address, port) as a vantage of ``side`` looks at them, the SSH port first."""
        addresses = self.public if side == "internet" else self.tailnet
        ports = (self.port, *(self.others if side == "internet" else ()))
        return [(family, addresses[family], port) for port in ports for family in FAMILIES if family in addresses]


def measure_exposure(
    vantages: Sequence[Vantage],
    public: Mapping[int, str],
    tailnet: Mapping[int, str],
    *,
    runner: Runner,
    port: int = SSH_PORT,
) -> Exposure:
    """Probe from every vantage at once: those on the internet side the ``public`` addresses, the others the ``tailnet``
    ones (family → address). A vantage that cannot be used gives unknown cells, never an exception."""
    return measure_hosts(vantages, {"": Sight(public, tailnet, port)}, runner=runner)[""]


def measure_hosts(vantages: Sequence[Vantage], sights: Mapping[str, Sight], *, runner: Runner) -> dict[str, Exposure]:
    """The same for many hosts: every vantage looks at all of them in one go, all vantages at once."""
    if not vantages:
        return {host: Exposure(()) for host in sights}
    with ThreadPoolExecutor(max_workers=len(vantages)) as pool:
        parts = list(pool.map(lambda one: _measure(one, sights, runner), vantages))
    return {host: Exposure(tuple(cell for part in parts for cell in part[host])) for host in sights}


def probe_from(vantage: Vantage, targets: Sequence[tuple[int, str, int]], *, runner: Runner) -> list[dict[str, Any]]:
    """What ``vantage`` sees of ``targets`` (family, address, port), in that order: ``{family, address, port, outcome,
    banner, detail}``. ClawdletsError when the probe cannot be run there, or its answer is not understood."""
    words = [str(word) for target in targets for word in target]
    reader = ["python3" if vantage.via else sys.executable, "-I", "-"]
    if vantage.bash:
        reader = ["bash", "-s", "--"]
    result = runner.run(
        Command(
            [*vantage.via, *reader, *words],
            f"look from {vantage.name}",
            stdin=_script("probe.bash" if vantage.bash else "probe.py"),
            timeout_s=PROBE_TIMEOUT_S,
        )
    ).check()
    try:
        results = list(json.loads(result.stdout)["results"])
        seen = [(one["family"], one["address"], one["port"]) for one in results]
    except (ValueError, KeyError, TypeError) as error:
        raise ClawdletsError(f"the probe's answer is not understood: {error!r}", where=vantage.name) from error
    if seen != list(targets):
        raise ClawdletsError("the probe answered for other targets than it was asked about", where=vantage.name)
    return results


def _measure(vantage: Vantage, sights: Mapping[str, Sight], runner: Runner) -> dict[str, list[Cell]]:
    wanted = {host: sight.targets(vantage.side) for host, sight in sights.items()}
    targets = [target for some in wanted.values() for target in some]
    if not targets:
        return {host: [] for host in sights}
    families = sorted({target[0] for target in targets})
    controls = [(family, *vantage.controls[family]) for family in families if family in vantage.controls]
    try:
        results = probe_from(vantage, [*targets, *controls], runner=runner)
    except ClawdletsError as error:
        said = error.what.strip().splitlines()[0][:200]
        return {
            host: [Cell(vantage.name, vantage.side, *target, reach="unknown", detail=said) for target in some]
            for host, some in wanted.items()
        }
    reached = {one["family"] for one in results[len(targets) :] if one["outcome"] == "open"}
    seen = iter(results)
    return {
        host: [
            Cell(
                vantage.name,
                vantage.side,
                *target,
                *_read(next(seen), control=vantage.controls.get(target[0]), reached=target[0] in reached),
            )
            for target in some
        ]
        for host, some in wanted.items()
    }


def _read(result: Mapping[str, Any], *, control: tuple[str, int] | None, reached: bool) -> tuple[Reach, str]:
    """What one result means, given how the control of its family came out."""
    outcome = str(result["outcome"])
    if outcome == "open":
        return "yes", f"open, {result['banner']}" if result["banner"] else "open"
    if control is None:
        return "unknown", f"{outcome}, and there is no positive control for this family"
    if not reached:
        return "unknown", f"{outcome}, but the positive control {control[0]} port {control[1]} was not reached either"
    if outcome not in _SEEN_AS:
        return "unknown", f"{outcome} ({result['detail']})" if result["detail"] else outcome
    return _SEEN_AS[outcome], outcome


def _place(cell: Cell) -> str:
    return f"{cell.vantage} over IPv{cell.family}"


def _script(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
