"""Secrets on a running host: brought there whole or not at all, taken away again, and its key changed under its feet."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops import age
from clawdlets_ops.age import Identity
from clawdlets_ops.errors import SyncError, UnreachableError
from clawdlets_ops.lab import control
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import Command, LocalRunner, Result
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.secrets import changes, hostkeys, sync
from clawdlets_ops.secrets.vault import open_all, operator_identity, read_all
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops
from tests.lab.conftest import LabProject

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1500)]

PROGRAM = "/run/current-system/sw/bin/clawdlets-sync"
SETS = "/var/lib/clawdlets/secrets/hosts/alpha"
BOT = """\
[Service]
User=bot-maren
ExecStartPre=/bin/sh -c '! grep -q refuse-me /run/secrets/discord_token'
ExecStart=/bin/sleep infinity
"""
WATCHER = """\
[Service]
ExecStart=/usr/bin/python3 /root/watch.py
RuntimeDirectory=watch
"""
WATCH = """\
import pathlib, time
while True:
    try:
        there = bool(pathlib.Path("/run/secrets/model_api_key").read_bytes())
    except OSError:
        there = False
    pathlib.Path("/run/watch/" + ("seen" if there else "gone")).touch()
    time.sleep(0.002)
"""


class CutError(BaseException):
    """The operator's machine stopped."""


class Bench:
    """The project's host, bootstrapped, with a bot that uses its secrets."""

    def __init__(self, lab: LabProject) -> None:
        self.lab = lab

    @property
    def project(self) -> Project:
        return load_project(self.lab.root, self.lab.env())

    @property
    def runner(self) -> LocalRunner:
        return LocalRunner(self.project.environ)

    def guest(self, *argv: str, stdin: str | None = None, ok: bool = True) -> Result:
        """Run in the machine as root, past its network."""
        layout = Layout(self.lab.root)
        command = Command(control.guest_argv(layout, "alpha", argv), f"run {argv[0]} in alpha", stdin=stdin)
        result = self.runner.run(command)
        return result.check() if ok else result

    def put(self, path: str, text: str) -> None:
        self.guest("sh", "-c", f"cat >{path}", stdin=text)

    @contextlib.contextmanager
    def link(self) -> Iterator[sync.Link]:
        cloud: Any = None  # over the tailnet no API is asked
        with sync.connect(self.project, "alpha", runner=self.runner, cloud=cloud) as link:
            yield link

    def set(self, name: str, value: str) -> None:
        changes.set_secret(self.project, "alpha", name, Secret(value, name), runner=self.runner)

    def sync(self, *, ok: bool | None = True) -> str:
        return self.lab.run("clawdlets", "secrets", "sync", "alpha", ok=ok).stdout

    def decrypted(self, name: str) -> str:
        return self.guest("cat", f"/run/secrets/{name}").stdout

    def on_disk(self) -> str:
        """A digest of everything of ours that is on the host's disk and among its decrypted files."""
        script = (
            "cd /; find var/lib/clawdlets/secrets* var/lib/sops-nix run/secrets/ -exec stat -c '%n %a %u %s' {} + ; "
        )
        script += "find var/lib/clawdlets/secrets* var/lib/sops-nix run/secrets/ -type f -exec sha256sum {} +"
        return hashlib.sha256(self.guest("sh", "-c", script).stdout.encode()).hexdigest()

    def repository(self) -> dict[str, bytes]:
        root = self.project.layout.secrets_dir
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    def count(self, pattern: str) -> int:
        said = self.guest("journalctl", "--no-pager", "--output=cat", "--boot").stdout
        return len(re.findall(pattern, said))

    def started(self) -> str:
        return self.guest("cut", "-d ", "-f22", "/proc/1/stat").stdout

    def reboot(self) -> None:
        before = self.started()
        self.guest("systemctl", "reboot", ok=False)

        def up() -> bool:
            with contextlib.suppress(Exception):
                if self.started() != before:
                    with self.link() as link:
                        return bool(link.status().keys)
            return False

        until(up, "the host is back on the tailnet after a reboot", within_s=180)


def until(true: Callable[[], bool], what: str, *, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def bench(project: LabProject) -> Bench:
    said = project.bootstrap()
    bench = Bench(project)
    # the payload's private keys are gone with the verification, and nothing asks for them to be laid out again
    assert "verify" in said
    assert not any(Layout(project.root).extra_files("alpha").parent.glob("*"))
    assert project.run("clawdlets", "plan", "payload", "--host", "alpha").stdout.strip() == "nothing to do"
    bench.put("/etc/systemd/system/bot.service", BOT)
    bench.put("/etc/systemd/system/watcher.service", WATCHER)
    bench.put("/root/watch.py", WATCH)
    bench.guest("systemctl", "daemon-reload")
    bench.guest("systemctl", "start", "bot.service", "watcher.service")
    until(lambda: bench.guest("test", "-e", "/run/watch/seen", ok=False).ok, "the watcher sees a secret")
    return bench


def test_a_changed_secret_reaches_its_service_and_a_second_run_is_one_command(bench: Bench) -> None:
    bench.set("discord_token", "canary-synced-1")
    said = bench.sync()
    assert "replace discord_token on alpha" in said
    assert "restarted bot.service" in said
    assert "watcher.service" not in said
    assert bench.decrypted("discord_token") == "canary-synced-1"
    before, commands, logins = (
        bench.on_disk(),
        bench.count(r"COMMAND=.*clawdlets-sync"),
        bench.count("Accepted publickey"),
    )
    repository = bench.repository()
    again = bench.sync()
    assert again.splitlines()[-1].startswith("alpha: unchanged set: repository ")
    assert "replace" not in again
    assert "restarted" not in again
    assert (bench.on_disk(), bench.repository()) == (before, repository)
    assert bench.count(r"COMMAND=.*clawdlets-sync") == commands + 1
    assert bench.count("Accepted publickey") == logins + 1
    assert "No changes" in bench.lab.run("pyinfra", "-y", "inventory/lab.py", "deploys/secrets.py").stdout
    assert bench.on_disk() == before


def test_a_removed_secret_is_gone_from_the_host_in_every_form(bench: Bench) -> None:
    bench.lab.fleet(lambda document: document["hosts"]["alpha"]["secrets"].update(spare_key={"owner": "bot-maren"}))
    bench.set("spare_key", "canary-spare-key-1")
    assert "add spare_key" in bench.sync()
    assert bench.decrypted("spare_key") == "canary-spare-key-1"
    bench.lab.fleet(lambda document: document["hosts"]["alpha"]["secrets"].pop("spare_key"))
    assert "removed secrets/hosts/alpha/spare_key.yaml" in bench.lab.run("clawdlets", "secrets", "reconcile").stdout
    assert "remove spare_key on alpha" in bench.sync()
    found = bench.guest("find", "/var/lib/clawdlets", "/run/secrets.d", "/run/secrets/", "-name", "*spare_key*").stdout
    assert found == ""
    assert "spare_key" not in bench.guest("cat", "/var/lib/clawdlets/secrets-wiring.json").stdout
    assert "unchanged" in bench.lab.run("clawdlets", "secrets", "reconcile").stdout


def test_a_set_that_a_service_does_not_bear_is_taken_back(bench: Bench) -> None:
    before = bench.on_disk()
    value = bench.decrypted("discord_token")
    bench.set("discord_token", "refuse-me-canary")
    said = bench.sync(ok=False)
    assert "bot.service did not restart" in said
    assert "is in place and active again" in said
    assert bench.decrypted("discord_token") == value
    assert bench.on_disk() == before
    assert bench.guest("systemctl", "is-active", "bot.service").stdout.strip() == "active"
    # the same, with the activation itself failing: a secret whose owner cannot be made
    bench.set("discord_token", "canary-synced-2")
    bench.guest("mount", "--bind", "/bin/false", "/usr/local/bin/sops")
    try:
        said = bench.sync(ok=False)
    finally:
        bench.guest("umount", "/usr/local/bin/sops")
    assert "THE PREVIOUS SET IS IN PLACE BUT NOT ACTIVE" in said  # nothing can be decrypted at all
    assert bench.decrypted("discord_token") == value
    assert "replace discord_token" in bench.sync()
    assert bench.decrypted("discord_token") == "canary-synced-2"


def test_what_is_hostile_is_refused_with_the_old_set_still_active(bench: Bench) -> None:
    before = bench.on_disk()
    project = bench.project
    wanted = sync.repository_set(project, "alpha")
    key = sync.host_identities(project, "alpha", runner=bench.runner)[0]
    stranger = age.generate()
    wiring = json.loads(wanted.wiring)
    name = next(iter(wanted.files))
    climbing = [{**wiring["secrets"][0], "name": "../x", "sopsFile": f"{SETS}/../x.yaml"}]

    def rewired(entries: list[dict[str, Any]]) -> str:
        return json.dumps({"host": "alpha", "secrets": entries})

    def body(**changed: Any) -> dict[str, Any]:
        return {"wiring": wanted.wiring, "files": dict(wanted.files), **changed}

    hostile: list[tuple[str, dict[str, Any], Identity]] = [
        ("MAC", body(), stranger),
        ("name is not acceptable", body(wiring=rewired(climbing), files={"../x": wanted.files[name]}), key),
        ("not exactly those that are wired", body(files={**wanted.files, "../x": "x"}), key),
        ("wired to a file elsewhere", body(wiring=wanted.wiring.replace(f"{SETS}/", "/etc/")), key),
        ("larger than", body(files={**wanted.files, name: wanted.files[name] + "x" * (4 << 20)}), key),
        ("not a file of that name", body(files={**wanted.files, name: "canary: in clear\n"}), key),
        ("its mode", body(wiring=wanted.wiring.replace('"0400"', '"0777"', 1)), key),
        ("of another type", body(files=[]), key),
        ("exactly the keys", {**body(), "more": 1}, key),
    ]
    with bench.link() as link:
        base = link.status().digest
        for words, sent, signer in hostile:
            with pytest.raises(SyncError, match=words):
                link.send("set", base=base, body=sent, signer=signer)
        with pytest.raises(SyncError, match="somebody else was here"):
            link.send("set", base="0" * 64, body=body(), signer=key)
        with pytest.raises(SyncError, match="more than"):
            link.ask("set", Secret("x" * ((32 << 20) + 1), "too much"))
        with pytest.raises(SyncError, match="not a whole JSON document"):
            link.ask("set", Secret('{"version": 1', "cut off"))
        keys = hashlib.sha256("\n".join(link.status().keys).encode()).hexdigest()
        with pytest.raises(SyncError, match="do not open every file"):
            link.send("keys", base=keys, body={"identities": [stranger.secret.reveal()]}, signer=key)
        for verb in ("settle", "status extra", "'set;id'", "prove --help"):
            with pytest.raises(SyncError, match="may not run"):
                link.ask(verb)
    assert bench.on_disk() == before
    # what somebody planted on the host is seen, not followed, and replaced
    bench.guest("sh", "-c", f"cd {SETS} && mv {name}.yaml /root/aside && ln -s /root/aside {name}.yaml")
    bench.guest("ln", "-sfn", "/etc", "/var/lib/clawdlets/sync/next")
    said = bench.sync()
    assert f"replace {name}" in said
    assert bench.on_disk() == before
    assert bench.guest("test", "-s", "/etc/passwd").ok
    bench.guest("rm", "/root/aside")


def test_rebooted_in_the_middle_the_host_has_the_old_set_and_a_second_run_brings_the_new_one(bench: Bench) -> None:
    before, value = bench.on_disk(), bench.decrypted("discord_token")
    bench.set("discord_token", "canary-synced-3")
    wanted = sync.repository_set(bench.project, "alpha").digest
    # activation stands still: the new files are in place and nothing is proved when operator and host both stop
    bench.guest("mkdir", "-p", "/etc/systemd/system/bot.service.d")
    bench.put(
        "/etc/systemd/system/bot.service.d/slow.conf", "[Service]\nExecStartPre=/bin/sleep 600\nTimeoutStartSec=900\n"
    )
    bench.guest("systemctl", "daemon-reload")
    process = bench.lab.popen("clawdlets", "secrets", "sync", "alpha")
    until(
        lambda: bench.guest("test", "-e", "/var/lib/clawdlets/sync/journal.json", ok=False).ok, "the set is swapped in"
    )
    until(lambda: bench.decrypted("discord_token") == "canary-synced-3", "it is activated")
    process.kill()
    process.communicate()
    bench.guest("rm", "-r", "/etc/systemd/system/bot.service.d")
    bench.reboot()
    assert bench.decrypted("discord_token") == value
    assert bench.on_disk() == before
    assert "replace discord_token" in bench.sync()
    assert bench.decrypted("discord_token") == "canary-synced-3"
    with bench.link() as link:
        assert link.status().digest == wanted
    bench.guest("systemctl", "start", "bot.service", "watcher.service")


def test_a_host_key_is_rotated_under_a_running_service_and_cut_off_at_each_step(bench: Bench) -> None:
    project = bench.project
    first = sync.host_identities(project, "alpha", runner=bench.runner)[0]
    old_files = bench.repository()
    mark = project.layout.host_old_age_public_key("alpha")
    steps: list[tuple[bool, str]] = []

    def cut(text: str) -> None:
        """Ends the run as a lost machine would, before each step that it did not end before yet."""
        if (mark.exists(), text) not in steps:
            steps.append((mark.exists(), text))
            raise CutError

    def rotate() -> bool:
        try:
            with bench.link() as link:
                hostkeys.rotate(bench.project, link, runner=bench.runner, say=cut)
        except CutError:
            return False
        return True

    bench.guest("rm", "-f", "/run/watch/gone")
    while not rotate():
        with bench.link() as link:  # whatever it was in the middle of, the host opens what it has
            assert any(link.prove().values()), steps[-1]
    assert len(steps) > 15, steps
    assert bench.guest("test", "-e", "/run/watch/seen").ok
    assert not mark.exists()
    assert not project.layout.host_next_age_key_file("alpha").exists()
    second = sync.host_identities(project, "alpha", runner=bench.runner)[0]
    assert second.recipient != first.recipient
    assert not bench.guest("test", "-e", "/run/watch/gone", ok=False).ok, "the service lost its secret"
    assert bench.guest("cat", "/var/lib/sops-nix/key.txt").stdout == f"{second.secret.reveal()}\n"
    assert "alpha: unchanged" in bench.sync()
    # with the key that the host had, nothing current opens; what is in git's past does
    assert opened_with(bench, first) == set()
    assert opened_with(bench, second) == {path.name for path in project.layout.host_secrets_dir("alpha").glob("*.yaml")}
    past = bench.lab.root / "past.yaml"
    past.write_bytes(old_files["hosts/alpha/discord_token.yaml"])
    sops = Sops(bench.runner, find_sops(bench.runner))
    assert sops.decrypt(past, identity=first.secret)["discord_token"].reveal() == "canary-synced-3"
    past.unlink()
    bench.reboot()  # it comes up by the new key alone
    assert bench.decrypted("discord_token") == "canary-synced-3"


def opened_with(bench: Bench, identity: Identity) -> set[str]:
    """Names of all encrypted files of the repository that ``identity`` opens, tried with the real sops."""
    files = [path for path in bench.project.layout.secrets_dir.rglob("*.yaml") if path.name != ".sops.yaml"]
    found, faults = read_all(files)
    assert len(found) == len(files) > 4, faults
    sops = Sops(bench.runner, find_sops(bench.runner))
    claimed = [replace(sealed, recipients=sealed.recipients | {identity.recipient}) for sealed in found.values()]
    opened, _ = open_all(sops, claimed, identity)  # tried whatever the metadata says
    return {path.name for path in opened}


def test_a_revoked_operator_opens_nothing_current_with_any_key_that_was_theirs(bench: Bench) -> None:
    lena = replace(bench.project, operator="lena")
    changes.add_operator(lena, runner=bench.runner)
    changes.reconcile(bench.project, runner=bench.runner)
    key = operator_identity(lena)
    assert opened_with(bench, key)  # they could, while they were one of us
    kept = sync.host_identities(lena, "alpha", runner=bench.runner)[0]  # and have kept the host's own key
    assert "changed" in bench.sync()
    bench.lab.run("clawdlets", "secrets", "rotate", "--operator", "lena", "--revoke")
    bench.lab.run("clawdlets", "secrets", "rotate", "--host-key", "alpha")
    assert opened_with(bench, key) == set()
    assert opened_with(bench, kept) == set()
    on_host = bench.guest("sh", "-c", f"cat {SETS}/*.yaml").stdout
    assert kept.recipient not in on_host
    assert key.recipient not in on_host
    sent = sync.repository_set(bench.project, "alpha")
    body = {"wiring": sent.wiring, "files": dict(sent.files)}
    with bench.link() as link:
        base = link.status().digest
        with pytest.raises(SyncError, match="MAC"):  # nor can the old key still change anything there
            link.send("set", base=base, body=body, signer=kept)
    assert bench.lab.run("clawdlets", "verify", "--host", "alpha").returncode == 0


def test_a_host_that_is_not_there_is_said_so_and_others_are_not_kept_from_it(bench: Bench, tmp_path: Path) -> None:
    nowhere = replace(bench.project, environ={**bench.project.environ, "PATH": str(tmp_path)})

    class NoCloud:
        def server(self, name: str) -> None:
            return None

    runner = LocalRunner(nowhere.environ)
    cloud: Any = NoCloud()
    with (
        pytest.raises(UnreachableError, match="no address"),
        sync.connect(nowhere, "alpha", runner=runner, cloud=cloud),
    ):
        pass
