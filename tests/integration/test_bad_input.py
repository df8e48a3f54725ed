"""Bad input, as a user meets it: the real pyinfra, the emulator with no machines behind it, and a clear sentence each.

Each case ends non-zero, says what and where, shows no traceback, and has changed nothing in the cloud.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hcloud
import pytest
from hcloud.images import Image
from hcloud.server_types import ServerType

from clawdlets_ops import ssh
from clawdlets_ops.errors import UnreachableError
from clawdlets_ops.lab.api import Emulator
from clawdlets_ops.lab.backend import LoopbackPool, StubBackend
from clawdlets_ops.lab.cloud import Cloud

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
TOKEN = "canary00" * 8
VALUES = {
    "admin_password": "canary-admin-password",
    "breakglass_password": "canary-breakglass-password",
    "tailscale_auth_key": "canary-tailscale-auth-key",
    "discord_token": "canary-discord-token",
    "model_api_key": "canary-model-api-key",
}


@dataclass
class Desk:
    """An operator's checkout against an emulator; ``env`` is what a case changes."""

    root: Path
    journal_file: Path
    endpoint: str
    env: dict[str, str] = field(default_factory=dict)

    def pyinfra(self, deploy: str = "bootstrap", *more: str) -> tuple[int, str]:
        done = subprocess.run(
            [str(PROGRAMS / "pyinfra"), "-y", "inventory/prod.py", f"deploys/{deploy}.py", *more],
            cwd=self.root, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def refused(self, said: str, deploy: str = "bootstrap") -> str:
        """Run, and hold the rules of a refusal."""
        before = self.mutations()
        status, text = self.pyinfra(deploy)
        assert status != 0, text
        assert said in text
        assert "Traceback" not in text
        assert self.mutations() == before
        for value in (*VALUES.values(), TOKEN):
            assert value not in text
        return text

    def mutations(self) -> list[dict[str, Any]]:
        return [entry for line in self.journal_file.read_text().splitlines() if (entry := json.loads(line))["mutates"]]

    def fleet(self, change: Callable[[dict[str, Any]], Any]) -> None:
        path = self.root / "fleet" / "clawdlets.json"
        document = json.loads(path.read_text())
        change(document["hosts"]["alpha"])
        path.write_text(json.dumps(document))

    def without(self, program: str) -> None:
        """A search path on which everything is but ``program``."""
        folder = self.root / "bin"
        folder.mkdir()
        for place in self.env["PATH"].split(":")[::-1]:
            for found in Path(place).glob("*") if Path(place).is_dir() else ():
                (folder / found.name).unlink(missing_ok=True)
                (folder / found.name).symlink_to(found)
        (folder / program).unlink(missing_ok=True)
        self.env["PATH"] = str(folder)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    root = tmp_path / "project"
    for name in ("fleet", "deploys", "inventory"):
        shutil.copytree(ROOT / name, root / name)
    (root / ".gitignore").write_text("/.clawdlets/\n")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    key = root / ".clawdlets" / "keys" / "operators" / "ssh_ed25519"
    key.parent.mkdir(parents=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "canary", "-f", str(key)], check=True)
    values = root / ".clawdlets" / "values.json"
    values.write_text(json.dumps(VALUES))
    values.chmod(0o600)
    stand_ins = tmp_path / "stand-ins"  # programs that must be there and must not be reached
    stand_ins.mkdir()
    for name in ("nixos-anywhere", "tofu"):
        (stand_ins / name).write_text("#!/bin/sh\necho reached; exit 97\n")
        (stand_ins / name).chmod(0o755)
    cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=None)
    emulator = Emulator(cloud, token=TOKEN, journal_file=tmp_path / "journal.jsonl")
    emulator.start()
    env = {
        "PATH": f"{stand_ins}:{PROGRAMS}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "USER": "olive",
        "NO_COLOR": "1",
        "HCLOUD_TOKEN": TOKEN,
        "HCLOUD_ENDPOINT": emulator.endpoint,
        "CLAWDLETS_SECRETS_FILE": ".clawdlets/values.json",
        "CLAWDLETS_POLL_INTERVAL_S": "0.05",
    }
    yield Desk(root, tmp_path / "journal.jsonl", emulator.endpoint, env)
    emulator.stop()
    cloud.close()


def test_no_token(desk: Desk) -> None:
    del desk.env["HCLOUD_TOKEN"]
    desk.refused("HCLOUD_TOKEN: no Hetzner token")


def test_something_that_is_no_token(desk: Desk) -> None:
    desk.env["HCLOUD_TOKEN"] = "short"
    desk.refused("64 letters and digits expected, 5 characters found")


def test_a_token_that_the_api_does_not_accept(desk: Desk) -> None:
    desk.env["HCLOUD_TOKEN"] = TOKEN[::-1]
    desk.refused("the API does not accept this token")


def test_an_api_that_does_not_answer(desk: Desk) -> None:
    desk.env["HCLOUD_ENDPOINT"] = "http://127.0.0.1:9/v1"
    desk.refused("the API does not answer")


def test_an_unknown_key(desk: Desk) -> None:
    desk.fleet(lambda host: host.update(sshExposre=host.pop("sshExposure")))
    desk.refused("hosts.alpha.sshExposre: unknown key; did you mean 'sshExposure'?")


def test_world_open_networks(desk: Desk) -> None:
    desk.fleet(lambda host: host["provisioning"].update(adminCidrs=["0.0.0.0/1", "128.0.0.0/1"]))
    desk.refused("open the host to the internet at large (0.0.0.0/0)")


def test_values_that_are_missing(desk: Desk) -> None:
    (desk.root / ".clawdlets" / "values.json").write_text(json.dumps({"discord_token": VALUES["discord_token"]}))
    text = desk.refused("values are missing for alpha; nothing was written")
    assert "model_api_key" in text
    assert not (desk.root / "secrets" / "hosts").exists()


def test_a_values_file_that_others_can_read(desk: Desk) -> None:
    (desk.root / ".clawdlets" / "values.json").chmod(0o644)
    desk.refused("is open to group or others")


def test_an_unreadable_secret_is_not_absent_and_is_not_overwritten(desk: Desk) -> None:
    assert "server" not in desk.pyinfra("payload")[1]
    secret = desk.root / "secrets" / "hosts" / "alpha" / "discord_token.yaml"
    broken = secret.read_text().replace("ENC[AES256_GCM,data:", "ENC[AES256_GCM,data:AAAA", 1)
    secret.write_text(broken)
    desk.refused("discord_token.yaml")
    assert secret.read_text() == broken


def test_a_missing_ssh_key(desk: Desk) -> None:
    (desk.root / ".clawdlets" / "keys" / "operators" / "ssh_ed25519.pub").unlink()
    desk.refused("ssh_ed25519.pub: cannot be read")


@pytest.mark.parametrize("program", ["tofu", "nixos-anywhere", "ssh"])
def test_a_program_that_is_absent_is_missed_before_a_server_is_made(desk: Desk, program: str) -> None:
    desk.without(program)
    desk.refused(f"{program}: the program is not on PATH")


def test_a_project_outside_git(desk: Desk) -> None:
    shutil.rmtree(desk.root / ".git")
    desk.refused("not a git checkout")


def test_a_server_of_that_name_that_is_not_ours(desk: Desk) -> None:
    client = hcloud.Client(token=TOKEN, api_endpoint=desk.endpoint, poll_interval=0.05, timeout=10)
    made = client.servers.create(name="alpha", server_type=ServerType("cx23"), image=Image(name="debian-12"))
    made.action.wait_until_finished()
    text = desk.refused("there is already a server called 'alpha'")
    assert f"id {made.server.id}" in text


def test_a_runtime_dir_of_another_cloud(desk: Desk) -> None:
    marker = desk.root / ".clawdlets" / "infra" / "endpoint"
    marker.parent.mkdir()
    marker.write_text("https://elsewhere.example/v1\n")
    desk.refused("this runtime dir belongs to https://elsewhere.example/v1")


def test_the_labs_inventory_without_a_lab_and_the_other_way_round(desk: Desk) -> None:
    done = subprocess.run(
        [str(PROGRAMS / "pyinfra"), "-y", "inventory/lab.py", "deploys/bootstrap.py"],
        cwd=desk.root, env=desk.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "the lab is not up in this checkout" in done.stderr
    (desk.root / ".clawdlets" / "env").write_text("CLAWDLETS_ENVIRONMENT=lab\n")
    (desk.root / ".clawdlets" / "env").chmod(0o600)
    desk.refused("this checkout's environment is the lab")


def test_a_tofu_that_fails_shows_its_words_and_the_way_on(desk: Desk) -> None:
    status, text = desk.pyinfra()
    assert status != 0
    assert "reached" in text  # the stand-in's word, as OpenTofu's own would be
    assert desk.mutations() == []


def test_a_host_that_never_answers_is_given_up_with_what_to_do() -> None:
    with pytest.raises(UnreachableError, match=r"no SSH server answered within 0\.3 s") as caught:
        ssh.wait_for_key(["127.0.0.1"], frozenset(), why="first contact with alpha", timeout_s=0.3, poll_s=0.1, port=9)
    assert "console" in str(caught.value)
