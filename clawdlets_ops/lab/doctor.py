"""Whether this machine can have a lab: what is missing, and what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from clawdlets_ops.errors import ClawdletsError, LabError
from clawdlets_ops.finding import Finding, State
from clawdlets_ops.lab.headscale import REAL, Programs, obstacle
from clawdlets_ops.lab.processes import mount_points
from clawdlets_ops.lab.registry import claimable, read_record
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, LocalRunner, Runner

PROGRAMS: Final = {
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "nft": "nftables",
    "ssh-keygen": "openssh-client",
    "mount": "mount",
    "umount": "mount",
    "nsenter": "util-linux",
}
SETUP: Final = "clawdlets lab setup, or make setup in a checkout"
TOOLS: Final = ("tofu",)
TIERS: Final[dict[str, dict[str, str]]] = {
    "unit": {},
    "contract": {"age-keygen": "age", "ssh-keygen": "openssh-client", "mkpasswd": "whois", "hcloud": "hcloud-cli"},
    "integration": {
        "git": "git",
        "ssh": "openssh-client",
        "sshd": "openssh-server",
        "strace": "strace",
        "nft": "nftables",
    },
}
FREE_BYTES: Final = 2 * 1024**3
INOTIFY_INSTANCES: Final = 2048

_INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
_UNFIT_FOR_MOUNT = frozenset(":,\\\"'\n")


def require(layout: Layout, environ: Mapping[str, str]) -> None:
    """LabError with all that keeps a lab from coming up. Raises the limit of inotify instances when it is too low."""
    missing = [finding for finding in _essential(layout, environ) if finding.state is not State.PASS]
    if missing:
        raise LabError(
            "\n".join(["the lab cannot run here:", *(f"  {f.claim}: {f.observed}" for f in missing)]),
            where=str(layout.root),
            fix="; ".join(dict.fromkeys(finding.fix for finding in missing)),
        )
    if _inotify_instances() < INOTIFY_INSTANCES:
        _INOTIFY.write_text(str(INOTIFY_INSTANCES))


def doctor(layout: Layout, environ: Mapping[str, str]) -> list[Finding]:
    """Every check, also those that are not about the lab alone."""
    findings = _essential(layout, environ)
    tools = layout.cache / "tools" / "bin"
    path = f"{tools}:{environ.get('PATH', '')}"
    for tool in TOOLS:
        found = shutil.which(tool, path=path)
        findings.append(_finding("LAB-07", found is not None, f"{tool} is there", found or "not found", SETUP))
    findings.append(
        _finding(
            "LAB-08",
            (layout.cache / "tools" / "mirror").is_dir(),
            "the provider mirror is there",
            str(layout.cache / "tools" / "mirror"),
            SETUP,
        )
    )
    free = shutil.disk_usage(layout.root).free
    findings.append(
        _finding("LAB-09", free >= FREE_BYTES, "2 GB of disk are free", f"{free / 1024**3:.1f} GB", "free some disk")
    )
    now = _inotify_instances()
    observed = f"{now}" if now >= INOTIFY_INSTANCES else f"{now}; clawdlets lab up raises it, for good until a reboot"
    findings.append(Finding("LAB-10", State.PASS, f"inotify instances reach {INOTIFY_INSTANCES}", observed=observed))
    findings.append(_number(layout, LocalRunner(environ)))
    findings.append(_tailnet(layout, environ))
    return findings


def tiers(layout: Layout, environ: Mapping[str, str]) -> list[Finding]:
    """Which tiers of the tests this machine can run whole; a missing program is NOT_APPLICABLE, its tests are skipped."""
    path = f"{layout.cache / 'tools' / 'bin'}:{environ.get('PATH', '')}:/usr/sbin"
    findings = []
    for tier, programs in TIERS.items():
        lacking = {name: package for name, package in programs.items() if shutil.which(name, path=path) is None}
        fix = f"{SETUP} (Debian packages {', '.join(sorted(set(lacking.values())))})"
        findings.append(_tier(tier, f"{', '.join(lacking)} not found" if lacking else "", fix))
    broken = [finding for finding in _essential(layout, environ) if finding.state is not State.PASS]
    if not (layout.cache / "tools" / "mirror").is_dir():
        broken.append(_finding("LAB-08", False, "the provider mirror is there", "not built", SETUP))
    missing = "; ".join(f"{finding.claim}: {finding.observed}" for finding in broken)
    findings.append(_tier("lab", missing, "; ".join(dict.fromkeys(finding.fix for finding in broken))))
    return findings


def _tier(name: str, missing: str, fix: str) -> Finding:
    observed = f"no: {missing}" if missing else "yes"
    state = State.NOT_APPLICABLE if missing else State.PASS
    return Finding("LAB-12", state, f"the {name} tests run here", observed=observed, fix=fix if missing else "")


def _essential(layout: Layout, environ: Mapping[str, str]) -> list[Finding]:
    linux = sys.platform == "linux"
    findings = [
        _finding("LAB-01", linux, "this is Linux", sys.platform, "use a Linux machine"),
        _finding("LAB-02", linux and os.geteuid() == 0, "this is root", f"user {os.geteuid()}", "run it as root"),
    ]
    for program, package in PROGRAMS.items():
        found = shutil.which(program, path=environ.get("PATH"))
        fix = f"{SETUP} (Debian package {package})"
        findings.append(_finding("LAB-03", found is not None, f"{program} is there", found or "not found", fix))
    base = layout.cache / "lab" / "base"
    findings.append(
        _finding("LAB-04", (base / "usr/lib/systemd/systemd").exists(), "the base image is there", str(base), SETUP)
    )
    unfit = sorted(_UNFIT_FOR_MOUNT & set(f"{layout.root}{base.resolve()}"))
    observed = f"{layout.root} has {' '.join(unfit)}" if unfit else str(layout.root)
    findings.append(
        _finding("LAB-05", not unfit, "the path can be mounted", observed, "use a checkout with a plainer path")
    )
    if linux and all(finding.state is State.PASS for finding in findings):
        findings += _kernel(LocalRunner(environ))
    return findings


def _kernel(runner: Runner) -> list[Finding]:
    filesystems = Path("/proc/filesystems").read_text().split()
    overlay = "overlay" in filesystems or runner.run(Command(["modprobe", "overlay"], "load overlayfs")).ok
    groups = mount_points("cgroup2")
    nft = runner.run(Command(["nft", "list", "tables"], "ask for nftables"))
    fix = "use a kernel with it"
    return [
        _finding("LAB-06", overlay, "the kernel has overlayfs", "yes" if overlay else "no", fix),
        _finding("LAB-06", bool(groups), "cgroup2 is mounted", f"{groups[0]}" if groups else "no", "mount cgroup2"),
        _finding("LAB-06", nft.ok, "the kernel has nftables", "yes" if nft.ok else nft.tail(), fix),
        _finding(
            "LAB-06", Path("/proc/self/ns/net").exists(), "the kernel has network namespaces", "/proc/self/ns", fix
        ),
    ]


def _number(layout: Layout, runner: Runner) -> Finding:
    claim = "a lab number is free"
    try:
        return Finding("LAB-11", State.PASS, claim, observed=str(claimable(layout.root, runner)))
    except ClawdletsError as error:
        return Finding("LAB-11", State.FAIL, claim, observed=error.what, fix=error.fix)


def _tailnet(layout: Layout, environ: Mapping[str, str]) -> Finding:
    claim = "the lab's tailnet is the real one"
    tools = layout.cache / "tools"
    hindered = obstacle(tools, layout.lab / "tailnet", environ.get("PATH", ""))
    programs = Programs.find(tools)
    if hindered is not None or programs is None:
        said = f"no, the stand-in: {hindered.what}" if hindered else "no"
        return Finding("LAB-13", State.NOT_APPLICABLE, claim, observed=said, fix=hindered.fix if hindered else "")
    try:
        said = f"{programs.versions(LocalRunner(environ))} in {tools}"
        record = read_record(layout.lab)
    except ClawdletsError as error:
        return Finding("LAB-13", State.FAIL, claim, observed=error.what, fix="make tailnet")
    if record is not None and record.tailnet != REAL:
        said += "; but the lab that is there was made with the stand-in"
    return Finding("LAB-13", State.PASS, claim, observed=said)


def _inotify_instances() -> int:
    return int(_INOTIFY.read_text()) if _INOTIFY.exists() else INOTIFY_INSTANCES


def _finding(check: str, passed: bool, claim: str, observed: str, fix: str) -> Finding:
    return Finding(check, State.PASS if passed else State.FAIL, claim, observed=observed, fix="" if passed else fix)
