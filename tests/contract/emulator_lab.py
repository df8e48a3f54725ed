"""A running emulator without machines, and the real programs against it; for the contract tests of this folder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hcloud import Client

from clawdlets_ops.lab.api import Emulator
from clawdlets_ops.lab.cloud import Cloud, LoopbackPool, StubBackend

TOKEN = ("canary" * 11)[:64]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMFuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2Fu canary@lab\n"

REPOSITORY = Path(__file__).parents[2]
PROVIDER_VERSION = "1.68.0"
PROVIDER_NAME = f"terraform-provider-hcloud_v{PROVIDER_VERSION}"
# An address of the test's own: only the mirror can have it, so no run can ask a registry.
PROVIDER_SOURCE = "lab.invalid/hetznercloud/hcloud"


class Lab:
    """A running emulator without machines, and what it wrote down."""

    def __init__(self, folder: Path, backend: StubBackend, **more: Any) -> None:
        self.backend = backend
        self.cloud = Cloud(backend=backend, addresses=LoopbackPool(), state_file=folder / "cloud.json")
        self._journal_file = folder / "journal.jsonl"
        self.emulator = Emulator(self.cloud, token=TOKEN, journal_file=self._journal_file, **more)

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        return kept | {
            "HCLOUD_ENDPOINT": self.emulator.endpoint,
            "HCLOUD_TOKEN": TOKEN,
            "HCLOUD_CONFIG": "/dev/null",
        }

    def journal(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._journal_file.read_text().splitlines()]

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        client = Client(TOKEN, api_endpoint=self.emulator.endpoint, poll_interval=0.01, timeout=10)
        try:
            yield client
        finally:
            client._client._session.close()


@contextlib.contextmanager
def running_lab(folder: Path, backend: StubBackend, **more: Any) -> Iterator[Lab]:
    """``more`` goes to the Emulator."""
    lab = Lab(folder, backend, **more)
    lab.emulator.start()
    try:
        yield lab
    finally:
        lab.emulator.stop()
        lab.cloud.close()


def run(argv: list[str], environment: Mapping[str, str], cwd: Path | None = None, expected: int = 0) -> str:
    done = subprocess.run(argv, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == expected, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if expected in (0, 2) else done.stderr


def _binary(variable: str, name: str) -> Path:
    path = Path(os.environ.get(variable) or REPOSITORY / ".cache/tools/bin" / name)
    if not path.is_file():
        pytest.skip(f"{name} is missing: {variable} does not name it and the tools module has not built it")
    return path


class Tofu:
    """A working directory with the real provider, offered through a filesystem mirror."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self._program = _binary("CLAWDLETS_TOFU_BIN", "tofu")
        provider = _binary("CLAWDLETS_PROVIDER_BIN", PROVIDER_NAME)
        mirror = folder / "mirror"
        offered = mirror / PROVIDER_SOURCE / PROVIDER_VERSION / "linux_amd64"
        offered.mkdir(parents=True)
        (offered / PROVIDER_NAME).symlink_to(provider.resolve())
        config = folder / "tofu.rc"
        config.write_text(f'provider_installation {{\n  filesystem_mirror {{\n    path = "{mirror}"\n  }}\n}}\n')
        self.folder = folder / "work"
        self.folder.mkdir()
        self._environment = lab.environment() | {
            "TF_CLI_CONFIG_FILE": str(config),
            "TF_IN_AUTOMATION": "1",
            "CHECKPOINT_DISABLE": "1",
        }

    def write(self, **blocks: Any) -> None:
        """main.tf.json with the provider and these top-level blocks (resource, data, output …)."""
        required = {"hcloud": {"source": PROVIDER_SOURCE, "version": PROVIDER_VERSION}}
        provider = {"hcloud": {"poll_interval": "20ms", "poll_function": "constant"}}
        config = {"terraform": {"required_providers": required}, "provider": provider, **blocks}
        (self.folder / "main.tf.json").write_text(json.dumps(config))

    def __call__(self, *words: str, expected: int = 0) -> str:
        return run([str(self._program), *words], self._environment, self.folder, expected)

    def planned(self) -> dict[str, list[str]]:
        """What a plan would do to each resource, from the plan's own JSON."""
        self("plan", "-input=false", "-out=plan", "-no-color")
        changes = json.loads(self("show", "-json", "plan"))["resource_changes"]
        return {change["address"]: change["change"]["actions"] for change in changes}

    def apply(self) -> None:
        self("apply", "-auto-approve", "-input=false", "-no-color")
