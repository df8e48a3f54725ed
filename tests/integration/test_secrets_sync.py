"""What clawdlets-sync does to a host's files, cut off at every step of it, and a host key rotated with both sides cut off.

The program is the one that a host gets, loaded here with its paths below a temporary folder; sops and keys are real. What is
not is said by name: activation (``stand_in_activate``), systemd, and SSH (``StandInLink``).
"""

import hashlib
import importlib.machinery
import importlib.util
import io
import json
import os
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from clawdlets_ops import age
from clawdlets_ops.errors import SyncError
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.project import load_project
from clawdlets_ops.secrets import changes, hostkeys, payload, sync
from clawdlets_ops.secrets.disk import Disk
from clawdlets_ops.secrets.observe import status
from clawdlets_ops.secrets.status import State
from clawdlets_ops.secrets.store import check_host, init_host
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import find_sops

pytestmark = pytest.mark.integration

PROGRAM = Path(__file__).parents[2] / "clawdlets_ops" / "lab" / "profile" / "clawdlets-sync"
HASH = "$y$j9T$WXdOt/uoN1ard5zl4jvd.1$Hn6R9R4jX20RELeclg1KGANsl7FGZ5deoiF/ZTfqFx8"
VALUES = {"admin_password_hash": HASH, "breakglass_password_hash": HASH, "discord_token": "canary-discord-0003"}
HOST = {
    "provisioning": {"adminCidrs": ["192.0.2.0/24"], "sshPubkeyFile": "k.pub"},
    "sshExposure": {"mode": "public"},
    "tailnet": {"mode": "none"},
}
RUNNER = LocalRunner(os.environ)


class Cut(BaseException):
    """The machine stopped."""


def a_project(root: Path, owner="bot-maren"):
    host = {**HOST, "secrets": {"discord_token": {"owner": owner}}}
    (root / "fleet").mkdir(parents=True, exist_ok=True)
    (root / "fleet" / "clawdlets.json").write_text(json.dumps({"schemaVersion": 1, "hosts": {"alpha": host}}))
    return load_project(root, {"USER": "maren", "PATH": os.environ["PATH"]})


@pytest.fixture
def project(tmp_path):
    project = a_project(tmp_path / "project")
    init_host(project, "alpha", {name: Secret(value, name) for name, value in VALUES.items()}, runner=RUNNER)
    return project


@dataclass
class Machine:
    """A host's files below ``root`` and the program at work on them."""

    root: Path
    program: SimpleNamespace = None
    decrypts: bool = True
    steps: list = field(default_factory=list)
    cut_at: int | None = None

    def __post_init__(self):
        loader = importlib.machinery.SourceFileLoader("clawdlets_sync", str(PROGRAM))
        program = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        loader.exec_module(program)
        for name in ("HOME", "SETS", "WIRING", "WORK", "KEY_FILE"):
            setattr(program, name, f"{self.root}{getattr(program, name)}")
        program.DECRYPTED = (f"{self.root}/run/secrets",)
        program.OWNER = os.geteuid()
        program.PATH = f"{find_sops(RUNNER).parent}:{program.PATH}"
        program.consumers = lambda names, wirings: []
        program.activate = self.stand_in_activate
        for name in ("write_new", "put", "drop", "exchange", "sync_folder"):
            setattr(program, name, self._counted(name, getattr(program, name)))
        self.program = program

    def _counted(self, name, operation):
        def counted(*arguments):
            for moment in ("before", "after"):
                if moment == "after":
                    operation(*arguments)
                self.steps.append((moment, name))
                if self.cut_at == len(self.steps) - 1:
                    raise Cut

        return counted

    def stand_in_activate(self):
        """Opens every wired file with the keys that are here; shows a file's digest in the place of its content."""
        program = self.program
        if self.decrypts and not program.opens_all(program.identities()):
            return "cannot decrypt"
        folder = Path(program.DECRYPTED[0])
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for entry in program.read_wiring()["secrets"]:
            (folder / entry["name"]).write_text(program.files_in(program.live())[entry["name"]])
        return ""

    def lay_payload(self, project):
        payload.materialise(project, "alpha", runner=RUNNER)
        shutil.copytree(project.layout.extra_files("alpha"), self.root)
        (Path(self.program.WORK)).mkdir(mode=0o700)
        assert self.stand_in_activate() == ""


class StandInLink(sync.Link):
    """clawdlets-sync in this process in the place of a login; what it refuses is a SyncError as the real one's is."""

    def __init__(self, machine, monkeypatch):
        self.machine, self.host, self.asked, self._monkeypatch = machine, "alpha", [], monkeypatch

    def ask(self, verb, document=None):
        self.asked.append(verb)
        text = document.reveal() if document else ""
        self._monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        try:
            return self.machine.program.COMMANDS[verb]()
        except self.machine.program.Refused as error:
            raise SyncError(str(error), where="alpha") from None


@pytest.fixture
def machine(project, tmp_path):
    machine = Machine(tmp_path / "host")
    machine.lay_payload(project)
    return machine


def test_cut_off_at_every_step_the_host_has_one_set_whole_and_a_second_run_brings_the_other(
    project, machine, tmp_path, monkeypatch
):
    program, machine.decrypts = machine.program, False  # here it is the files that count, and there are many runs
    old_wiring, old = program.wiring_text(), program.files_in(program.live())
    project = a_project(project.layout.root, owner="bot-lena")  # the wiring changes with the files
    changes.set_secret(project, "alpha", "discord_token", Secret("canary-discord-0004"), runner=RUNNER)
    wanted = sync.repository_set(project, "alpha")
    new = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in wanted.files.items()}
    shutil.copytree(machine.root, tmp_path / "before")
    number, came_through = 0, 0
    while True:
        shutil.rmtree(machine.root)
        shutil.copytree(tmp_path / "before", machine.root)
        machine.steps, machine.cut_at = [], number
        try:
            sync.sync(project, StandInLink(machine, monkeypatch), runner=RUNNER)
        except Cut:
            machine.cut_at = None
        else:
            break
        assert program.files_in(program.live()) in (old, new), machine.steps[-1]
        shutil.copytree(machine.root, tmp_path / "cut")
        program.command_settle()  # as at boot
        settled = (program.files_in(program.live()), program.wiring_text())
        assert settled in ((old, old_wiring), (new, wanted.wiring)), machine.steps[-1]
        assert not list(Path(program.WORK).iterdir())
        if settled[0] == new:  # only what has been activated may stay
            shown = Path(program.DECRYPTED[0], "discord_token").read_text()
            assert shown == new["discord_token"], machine.steps[-1]
            came_through += 1
        shutil.rmtree(machine.root)
        shutil.move(tmp_path / "cut", machine.root)
        assert sync.sync(project, StandInLink(machine, monkeypatch), runner=RUNNER).on_host == wanted.digest
        assert stat.S_IMODE(Path(program.live(), "discord_token.yaml").stat().st_mode) == 0o400
        number += 1
    machine.cut_at = None
    assert number > 40
    assert 0 < came_through < number
    again = StandInLink(machine, monkeypatch)
    assert sync.sync(project, again, runner=None).plan.empty  # no sops, and one word
    assert again.asked == ["status"]


def test_a_host_key_is_rotated_with_the_operators_disk_cut_off_at_every_operation(project, machine, monkeypatch):
    first = sync.host_identities(project, "alpha", runner=RUNNER)[0]
    done, number, resumed = False, 0, False
    while not done:
        count = 0

        def cut(operation, number=number):
            def counted(*arguments, **options):
                nonlocal count
                count += 1
                result = operation(*arguments, **options)
                if count == number + 1:
                    raise Cut
                return result

            return counted

        plain = Disk()
        disk = Disk(
            write=cut(plain.write),
            remove=cut(plain.remove),
            remove_folder=cut(plain.remove_folder),
            ensure_folder=plain.ensure_folder,
            sweep=plain.sweep,
        )
        try:
            rotated = hostkeys.rotate(project, StandInLink(machine, monkeypatch), runner=RUNNER, disk=disk)
            done = True
        except Cut:
            assert machine.stand_in_activate() == "", number  # it would come up, whenever it rebooted
            number += 1
    resumed = rotated.resumed
    assert number > 10
    assert resumed
    second = sync.host_identities(project, "alpha", runner=RUNNER)
    assert [identity.recipient for identity in second] == [rotated.recipient]
    assert rotated.recipient != first.recipient
    assert machine.program.identities() == [second[0].secret.reveal()]
    assert sync.plan(sync.repository_set(project, "alpha"), StandInLink(machine, monkeypatch).status()).empty
    check_host(project, "alpha", runner=RUNNER)
    assert {row.state for row in status(project, runner=RUNNER)} == {State.PRESENT}
    assert not (project.layout.secrets_dir / "keys" / "next").exists()
    assert not (project.layout.secrets_dir / "keys" / "old").exists()
    assert not changes.reconcile(project, runner=RUNNER).changed


def test_while_a_rotation_is_under_way_other_commands_keep_both_keys(project, machine, monkeypatch):
    def stop(text):
        if text == "give the host both keys":
            raise Cut

    with pytest.raises(Cut):
        hostkeys.rotate(project, StandInLink(machine, monkeypatch), runner=RUNNER, say=stop)
    changes.set_secret(project, "alpha", "discord_token", Secret("canary-discord-0005"), runner=RUNNER)
    assert not changes.reconcile(project, runner=RUNNER).changed
    check_host(project, "alpha", runner=RUNNER)
    assert {row.state for row in status(project, runner=RUNNER)} == {State.PRESENT}
    rows = {row.name: row.readers for row in status(project, runner=RUNNER)}
    assert rows["discord_token"] == ("host alpha", "host alpha (next key)", "maren")
    changes.add_operator(load_project(project.layout.root, {"USER": "lena", "PATH": ""}), runner=RUNNER)
    changed = changes.reconcile(project, runner=RUNNER).updated
    assert "secrets/keys/next/alpha.agekey.yaml" in changed  # whoever reads the present key reads the next one
    assert hostkeys.rotate(project, StandInLink(machine, monkeypatch), runner=RUNNER).resumed


def test_a_host_that_has_a_key_nobody_knows_is_left_alone(project, machine, monkeypatch):
    stranger = age.generate()
    key = Path(machine.program.KEY_FILE)
    link = StandInLink(machine, monkeypatch)
    base = hashlib.sha256("\n".join(link.status().keys).encode()).hexdigest()
    ours = sync.host_identities(project, "alpha", runner=RUNNER)[0]
    with pytest.raises(SyncError, match="do not open every file"):
        link.send("keys", base=base, body={"identities": [stranger.secret.reveal()]}, signer=ours)
    with pytest.raises(SyncError, match="MAC"):
        link.send("keys", base=base, body={"identities": [ours.secret.reveal()]}, signer=stranger)
    machine.program.put(str(key), f"{stranger.secret.reveal()}\n{key.read_text()}", 0o400)
    before = key.read_text()
    with pytest.raises(SyncError, match="does not know"):
        hostkeys.rotate(project, StandInLink(machine, monkeypatch), runner=RUNNER)
    assert key.read_text() == before
    machine.program.put(str(key), f"{stranger.secret.reveal()}\n", 0o400)
    with pytest.raises(SyncError, match="another age key"):
        hostkeys.rotate(project, StandInLink(machine, monkeypatch), runner=RUNNER)


def test_the_tree_with_private_keys_goes_once_it_is_verified_and_comes_back_for_an_installation(project):
    tree = project.layout.extra_files("alpha")
    prepared = payload.prepare(project, "alpha", runner=RUNNER)
    assert not tree.exists()
    laid = payload.materialise(project, "alpha", runner=RUNNER)
    assert laid.digest == prepared.digest
    assert payload.is_prepared(project, "alpha")
    assert payload.discard(project, "alpha")
    assert not list(tree.parent.iterdir())
    assert payload.is_prepared(project, "alpha")
    assert not payload.discard(project, "alpha")
    assert not payload.prepare(project, "alpha", runner=None).changed  # starts nothing
    changes.set_secret(project, "alpha", "discord_token", Secret("canary-discord-0006"), runner=RUNNER)
    assert not payload.is_prepared(project, "alpha")
    assert payload.prepare(project, "alpha", runner=RUNNER).digest != laid.digest
    assert not tree.exists()
    again = payload.materialise(project, "alpha", runner=RUNNER)
    assert again.changed
    assert payload.payload_is_current(project, "alpha")


@pytest.mark.parametrize("left", ["the tree", "a part of it"])
def test_a_removal_that_was_cut_off_is_seen_and_finished(project, left):
    tree = project.layout.extra_files("alpha")
    payload.materialise(project, "alpha", runner=RUNNER)
    shutil.copytree(tree, tree.with_name("kept"))
    payload.discard(project, "alpha")
    tree.with_name("kept").rename(tree if left == "the tree" else tree.with_name(".alpha.0a0a0a0a0a0a.old"))
    assert not payload.is_prepared(project, "alpha")
    payload.prepare(project, "alpha", runner=RUNNER)
    assert not list(tree.parent.iterdir())
    assert payload.is_prepared(project, "alpha")


def test_reconcile_removes_the_trees_of_hosts_that_left_and_follows_no_link(project, tmp_path):
    payload.materialise(project, "alpha", runner=RUNNER)
    gone = project.layout.extra_files("beta")
    shutil.copytree(project.layout.extra_files("alpha"), gone)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    gone.with_name("gamma").symlink_to(outside)
    assert changes.reconcile(project, ["alpha"], runner=RUNNER).removed == ()
    planned = changes.reconcile(project, runner=RUNNER, dry_run=True)
    assert planned.removed == (".clawdlets/extra-files/beta", ".clawdlets/extra-files/gamma")
    assert gone.exists()
    assert changes.reconcile(project, runner=RUNNER).removed == planned.removed
    assert [path.name for path in gone.parent.iterdir()] == ["alpha"]
    assert (outside / "file").exists()
    assert not changes.reconcile(project, runner=RUNNER).changed
