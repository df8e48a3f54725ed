"""Hundreds of hosts against the request budget: ``clawdlets bootstrap`` on servers without machines.

``python -P benchmarks/fleet_stubs.py [--hosts 200] [--parallel 10] [--limit 3600] [--early 600]`` needs OpenTofu and the
provider. A server here is a row of the emulator and nothing boots, so the runs go ``--until provision``: payloads by sops,
servers and firewalls by the real OpenTofu, everything read back. The emulator keeps the budget that the API has: full at
first, refilled steadily, 429 when it is used up; the poll interval is the production one, not the lab's. It is as a project whose
limit of firewalls was raised: a host has one of its own, and 50 is what a project may have unless Hetzner is asked.

Four parts: the fleet from nothing; the same again, nothing to do; then, under a smaller budget and with as many hosts more
as ``--more``, a run that is ended by the few requests that are left; and that run gone on with once the budget is whole.
Counted in the emulator's journal: requests by whom and how they were answered, and what stands half made (a server without
its firewall, protection or labels).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hcloud

from clawdlets_ops.files import write_atomic
from clawdlets_ops.lab.scenario import environment, lay_out
from clawdlets_ops.layout import Layout

ROOT = Path(__file__).parents[1]
TOKEN = "canary00" * 8
COMMAND_TIMEOUT_S = 5400

EMULATOR = """
import sys
from pathlib import Path
from clawdlets_ops.lab.api import Emulator
from clawdlets_ops.lab.backend import LoopbackPool, StubBackend
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab import firewalls
from clawdlets_ops.lab.ratelimit import Budget
firewalls.FIREWALLS_PER_PROJECT = 1000
token, limit, state, journal = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=state)
emulator = Emulator(cloud, token=token, journal_file=journal, budget=Budget(limit))
emulator.start()
print(emulator.endpoint, flush=True)
sys.stdin.read()
emulator.stop()
cloud.close()
"""


class Site:
    """A project of an operator, and a cloud that is nothing but its API."""

    def __init__(self, folder: Path, hosts: Sequence[str]) -> None:
        self.layout = Layout(folder / "project")
        self.shell = {**environment(os.environ), "HOME": str(folder)}
        self.document = json.loads((ROOT / "fleet" / "clawdlets.json").read_text())
        self.alpha = self.document["hosts"]["alpha"]
        self.state, self.journal = folder / "cloud.json", folder / "journal.jsonl"
        self.journal.touch()
        self.document["hosts"] = self._hosts(hosts)
        self.document.pop("cattle", None)  # it names the host that was the only one
        lay_out(self.layout.root, self.document, cache=ROOT / ".cache", environ=self.shell)
        runtime = self.layout.runtime
        runtime.mkdir(mode=0o700)
        key = self.layout.root / self.alpha["provisioning"]["sshPubkeyFile"].removesuffix(".pub")
        key.parent.mkdir(parents=True, exist_ok=True)
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "olive", "-f", str(key)]
        subprocess.run(argv, check=True)
        tools = (ROOT / ".cache" / "tools").resolve()
        mirror = json.dumps(str(tools / "mirror"))
        write_atomic(
            folder / "tofurc", f"provider_installation {{\n  filesystem_mirror {{\n    path = {mirror}\n  }}\n}}\n"
        )
        # Before a server is ordered it is made sure that it could be installed; nothing is here.
        programs = folder / "bin"
        programs.mkdir()
        write_atomic(programs / "nixos-anywhere", "#!/bin/sh\nexit 1\n", mode=0o755)
        self.settings = {
            "HCLOUD_TOKEN": TOKEN, "CLAWDLETS_TOOL_PATH": f"{programs}:{tools / 'bin'}",
            "TF_CLI_CONFIG_FILE": str(folder / "tofurc"), "CLAWDLETS_SECRETS_FILE": str(folder / "values.json"),
        }  # fmt: skip
        self._write_values()

    def _hosts(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: copy.deepcopy(self.alpha) for name in names}

    def _write_values(self) -> None:
        names = ("admin_password", "breakglass_password", "tailscale_auth_key", *self.alpha["secrets"])
        values = {
            host: {name: f"canary-{host}-{name}" for name in names if name[0] != "$"} for host in self.document["hosts"]
        }
        write_atomic(self.layout.root.parent / "values.json", json.dumps(values))

    def add(self, names: Sequence[str]) -> None:
        self.document["hosts"] |= self._hosts(names)
        self.layout.fleet_file.write_text(json.dumps(self.document, indent=1))
        self._write_values()

    @contextmanager
    def cloud(self, limit: int) -> Iterator[hcloud.Client]:
        """The emulator with a full budget of ``limit`` an hour; its state stays."""
        argv = [sys.executable, "-c", EMULATOR, TOKEN, str(limit), str(self.state), str(self.journal)]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            endpoint = process.stdout.readline().strip()
            # One name for it, whatever its port: the runtime dir is bound to an environment.
            settings = {**self.settings, "HCLOUD_ENDPOINT": endpoint, "CLAWDLETS_ENVIRONMENT": "stubs"}
            write_atomic(self.layout.env_file, "".join(f"{name}={value}\n" for name, value in settings.items()))
            yield hcloud.Client(TOKEN, api_endpoint=endpoint, application_name="the-benchmark")
        finally:
            process.stdin.close()
            process.wait(timeout=30)
            process.stdout.close()

    def bootstrap(self, what: str, hosts: Sequence[str], *more: str) -> str:
        """Run the command and print what it cost."""
        before = len(self._entries())
        started = time.perf_counter()
        argv = ["clawdlets", "bootstrap", *hosts, "--until", "provision", *more]
        done = subprocess.run(
            argv, cwd=self.layout.root, env=self.shell, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_TIMEOUT_S,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        new = self._entries()[before:]
        states = Counter(
            re.findall(r"^\S+ +(changed|unchanged|failed|not begun|interrupted) +", done.stdout, re.MULTILINE)
        )
        whose = Counter("the provider" if "terraform" in entry["userAgent"] else "clawdlets" for entry in new)
        print(f"{what}: exit status {done.returncode}, {seconds:.0f} s")
        print(f"  hosts: {', '.join(f'{count} {state}' for state, count in states.items())}")
        a_host = len(new) / max(1, len(hosts))
        print(f"  requests: {len(new)} ({', '.join(f'{count} by {who}' for who, count in whose.items())}), {a_host:.1f} a host;"
              f" {len(new) / seconds * 3600:.0f} an hour; refused for the budget: {sum(entry['status'] == 429 for entry in new)}")  # fmt: skip
        kinds = Counter(
            f"{entry['method']} {re.sub(r'[0-9]+', 'N', entry['path'])}" for entry in new if entry["method"] == "GET"
        )
        print(f"  most asked: {', '.join(f'{kind} x {count}' for kind, count in kinds.most_common(5))}")
        told = Counter(re.findall(r"^\S+ +failed +\S+ +\S+ +(?:\S+: )?(.*?) *$", done.stdout, re.MULTILINE))
        for text, count in told.most_common(3):
            print(f"  told {count} times: {text}")
        if done.returncode not in (0, 1) or "Traceback" in done.stdout:
            raise RuntimeError(done.stdout[-6000:])
        sys.stdout.flush()
        return done.stdout

    def _entries(self) -> list[dict[str, Any]]:
        lines = self.journal.read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if "the-benchmark" not in entry["userAgent"]]

    def half_made(self, client: hcloud.Client) -> int:
        """Servers that are not whole: without their firewall, their protection or our labels."""
        servers: list[Any] = client.servers.get_all()
        whole = [
            server for server in servers
            if [one.status for one in server.public_net.firewalls] == ["applied"] and (server.protection or {})["delete"]
            and (server.labels or {}).get("managed-by") == "clawdlets"
        ]  # fmt: skip
        print(
            f"  in the cloud: {len(servers)} servers, {len(client.firewalls.get_all())} firewalls, {len(servers) - len(whole)} half made"
        )
        sys.stdout.flush()
        return len(servers) - len(whole)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", type=int, default=200)
    parser.add_argument("--parallel", type=int, default=10)
    parser.add_argument("--limit", type=int, default=3600, help="requests an hour, as the API has it")
    parser.add_argument("--early", type=int, default=600, help="the smaller budget of the run that ends early")
    parser.add_argument("--more", type=int, default=60, help="hosts that are added for it")
    options = parser.parse_args(words)
    hosts = [f"h{number:03}" for number in range(1, options.hosts + 1)]
    added = [f"n{number:03}" for number in range(1, options.more + 1)]
    parallel = ("--parallel", str(options.parallel))
    half = refused = 0
    with tempfile.TemporaryDirectory(prefix="clawdlets-stubs-") as folder:
        site = Site(Path(folder).resolve(), hosts)
        with site.cloud(options.limit) as client:
            site.bootstrap(f"{len(hosts)} hosts from nothing, {options.limit} requests an hour", hosts, *parallel)
            half += site.half_made(client)
            site.bootstrap("again, nothing to do", hosts, *parallel)
        site.add(added)
        with site.cloud(options.early) as client:
            site.bootstrap(f"{len(added)} hosts more, {options.early} requests an hour", added, *parallel)
            half += site.half_made(client)
        with site.cloud(options.limit) as client:
            site.bootstrap("gone on with, the budget whole", added, *parallel)
            half += site.half_made(client)
        refused = sum(entry["status"] == 429 for entry in site._entries())
    print(f"refused for the budget in all: {refused}; half made after any run: {half}")
    return 1 if refused or half else 0


if __name__ == "__main__":
    sys.exit(main())
