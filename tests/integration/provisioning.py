"""A project whose cloud is the emulator without machines, provisioned by the real OpenTofu and provider."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops import provision
from clawdlets_ops.hetzner import HetznerCloud, Server
from clawdlets_ops.lab.cloud import Cloud, LoopbackPool, StubBackend
from clawdlets_ops.lab.faults import FaultBook, FaultyEmulator, parse_fault
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.secrets import store
from clawdlets_ops.secrets.reconcile import plan_operator

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".cache" / "tools"
TOKEN = "canary".ljust(64, "0")


@dataclass
class Site:
    """The project below ``root``; ``said`` is what the last apply told."""

    root: Path
    cloud: Cloud
    emulator: FaultyEmulator
    book: FaultBook
    environ: dict[str, str]
    said: list[str] = field(default_factory=list)

    def declare(self, host: str = "alpha", state: dict[str, Any] | None = None, **hetzner: Any) -> None:
        """Put ``host`` into the fleet file with these fields of ``hetzner``."""
        document = json.loads(self.layout.fleet_file.read_text())
        made = {"provisioning": {"adminCidrs": ["203.0.113.0/24"], "sshPubkeyFile": "key.pub"}, "hetzner": hetzner}
        document["hosts"][host] = made
        if state is not None:
            document["state"] = state
        self.layout.fleet_file.write_text(json.dumps(document))

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    def project(self, *, allow_replace: str = "", refresh: bool = False) -> Project:
        loaded = load_project(self.root, self.environ)
        return replace(loaded, allow_replace=frozenset({allow_replace} - {""}), refresh=refresh)

    @property
    def api(self) -> HetznerCloud:
        return HetznerCloud(self.project().token, self.emulator.endpoint, poll_interval_s=0.02)

    def runner(self) -> LocalRunner:
        return LocalRunner(self.environ)

    def provision(self, host: str = "alpha", *, window_open: bool | None = None, **named: Any) -> Server:
        self.said.clear()
        project = self.project(**named)
        return provision.apply(
            project, host, runner=self.runner(), cloud=self.api, window_open=window_open, say=self.said.append
        )

    def plan(self, host: str = "alpha", **named: Any) -> provision.ProvisionPlan:
        return provision.plan_for(self.project(**named), host, cloud=self.api)

    def fault(self, text: str) -> None:
        self.book.add(parse_fault(text.split()))

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "journal.jsonl").read_text().splitlines() if line]

    def changed(self) -> list[str]:
        return [f"{entry['method']} {entry['path']}" for entry in self.requests() if entry["mutates"]]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return self.cloud.rows(kind)

    def folder(self, host: str = "alpha") -> Path:
        return self.layout.tofu_dir(host)


def needs_tofu() -> None:
    """Skip where OpenTofu or the provider is missing."""
    if shutil.which("tofu", path=f"{TOOLS / 'bin'}:{os.environ['PATH']}") is None or not (TOOLS / "mirror").is_dir():
        pytest.skip("OpenTofu and the hcloud provider are not built (make tools)")


@contextlib.contextmanager
def site_in(root: Path) -> Iterator[Site]:
    """A project with one host, alpha, and an operator who has keys; its emulator runs."""
    needs_tofu()
    (root / "fleet").mkdir()
    Layout(root).fleet_file.write_text(json.dumps({"schemaVersion": 1, "hosts": {}}))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "canary", "-f", str(root / "key")], check=True)
    mirror = root / "tofurc"
    mirror.write_text(f'provider_installation {{\n  filesystem_mirror {{\n    path = "{TOOLS / "mirror"}"\n  }}\n}}\n')
    book = FaultBook()
    cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=root / "cloud.json")
    emulator = FaultyEmulator(cloud, token=TOKEN, journal_file=root / "journal.jsonl", book=book)
    emulator.start()
    environ = {
        "PATH": f"{TOOLS / 'bin'}:{os.environ['PATH']}",
        "HOME": str(root),
        "USER": "olive",
        "HCLOUD_TOKEN": TOKEN,
        "HCLOUD_ENDPOINT": emulator.endpoint,
        "TF_CLI_CONFIG_FILE": str(mirror),
        "CLAWDLETS_POLL_INTERVAL_S": "0.02",
    }
    site = Site(root, cloud, emulator, book, environ)
    site.declare("alpha")
    store.change(site.project(), lambda: plan_operator(site.project()), runner=site.runner())
    try:
        yield site
    finally:
        emulator.stop()
        cloud.close()
