"""Cut off anywhere, run again: no secret is lost, none lies in clear, none is for others than those declared.

Sequences of what operators do are made by hypothesis; each step is run once whole, then once for every file operation
it made, cut off there, looked at, and run again. Nearly all of it runs on a stand-in for sops that does the same with
real age keys and AES-GCM in this process (held against the real one below), because a process for each would take
an hour; one sequence runs on the real one.
"""

import base64
import json
import os
import secrets as random
import shutil
import stat
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyrage
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clawdlets_ops import age
from clawdlets_ops.errors import ClawdletsError, UnreadableError
from clawdlets_ops.files import ensure_dir, sweep_temporaries, write_atomic
from clawdlets_ops.process import LocalRunner, Result
from clawdlets_ops.project import Project, load_project
from clawdlets_ops.secrets import changes, edit
from clawdlets_ops.secrets.disk import Disk, remove, remove_if_empty, remove_tree
from clawdlets_ops.secrets.plan import needs
from clawdlets_ops.secrets.store import init_host
from clawdlets_ops.secrets.vault import declared_host, operators_of
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops, recipients

pytestmark = pytest.mark.integration

HASH = "$y$j9T$WXdOt/uoN1ard5zl4jvd.1$Hn6R9R4jX20RELeclg1KGANsl7FGZ5deoiF/ZTfqFx8"
BUDGET_S = 40.0
MAREN, LENA = age.generate(), age.generate()


class Cut(BaseException):
    """The machine stopped."""


@dataclass
class StandIn:
    """sops, as far as ``Sops`` asks for it: values under a data key, the data key under each age recipient."""

    ran: int = 0

    def which(self, program):
        return Path("/stand-in") / program

    def run(self, command, *, on_line=None):
        self.ran += 1
        if "encrypt" in command.argv:
            readers = command.argv[command.argv.index("--age") + 1].split(",")
            return Result(command, 0, self._encrypt(json.loads(command.stdin.reveal()), readers), "", duration_s=0.0)
        opened = self._decrypt(json.loads(command.stdin), command.env["SOPS_AGE_KEY"].reveal())
        text = json.dumps(opened) if opened is not None else ""
        return Result(command, 128 if opened is None else 0, text, "", duration_s=0.0)

    @staticmethod
    def _encrypt(plaintext, readers):
        key = random.token_bytes(32)
        document = {}
        for name, value in plaintext.items():
            iv = random.token_bytes(12)
            sealed = base64.b64encode(iv + AESGCM(key).encrypt(iv, value.encode(), name.encode())).decode()
            document[name] = f"ENC[AES256_GCM,data:{sealed},type:str]"
        wrapped = [
            {
                "recipient": reader,
                "enc": base64.b64encode(pyrage.encrypt(key, [pyrage.x25519.Recipient.from_str(reader)])).decode(),
            }
            for reader in readers
        ]
        return json.dumps({**document, "sops": {"age": wrapped, "mac": "", "version": "stand-in"}})

    @staticmethod
    def _decrypt(document, secret):
        identity = pyrage.x25519.Identity.from_str(secret)
        wrapped = {entry["recipient"]: entry["enc"] for entry in document.pop("sops")["age"]}
        try:
            key = pyrage.decrypt(base64.b64decode(wrapped[str(identity.to_public())]), [identity])
        except (KeyError, pyrage.DecryptError):
            return None
        sealed = {name: base64.b64decode(value.split("data:")[1].split(",")[0]) for name, value in document.items()}
        return {
            name: AESGCM(key).decrypt(data[:12], data[12:], name.encode()).decode() for name, data in sealed.items()
        }


@dataclass
class CutDisk:
    """Counts file operations in ``kinds``; cuts at number ``at``: after it, or, ``torn``, in the middle of a write."""

    at: int | None = None
    torn: bool = False
    kinds: list[str] = field(default_factory=list)

    def disk(self) -> Disk:
        return Disk(
            write=self._write,
            remove=lambda path: self._step("remove", remove, path),
            remove_folder=lambda path: self._step("remove_folder", remove_if_empty, path),
            remove_tree=lambda path: self._step("remove_tree", remove_tree, path),
            ensure_folder=lambda path, mode: self._step("ensure_folder", ensure_dir, path, mode),
            sweep=lambda path, prefixes: self._step("sweep", sweep_temporaries, path, prefixes),
        )

    def _step(self, kind, operation, *arguments, **options):
        self.kinds.append(kind)
        if self.at == -1:
            raise Cut
        result = operation(*arguments, **options)
        if self.at == len(self.kinds) - 1:
            raise Cut
        return result

    def _write(self, path, content, *, mode):
        if self.torn and self.at == len(self.kinds):
            fd = os.open(path.with_name(f".{path.name}.0a0a0a0a0a0a.tmp"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(fd, "w") as handle:
                handle.write(content[: len(content) // 2])
            raise Cut
        return self._step("write", write_atomic, path, content, mode=mode)


@dataclass
class World:
    """A project on disk, and what must be true of it: ``values`` by host and name."""

    root: Path
    runner: StandIn | LocalRunner
    hosts: dict[str, set[str]] = field(default_factory=lambda: {"alpha": {"token"}, "beta": {"token"}})
    declared: tuple[str, ...] = ()
    values: dict[tuple[str, str], str] = field(default_factory=dict)
    made: int = 0

    def project(self) -> Project:
        host = {
            "provisioning": {"adminCidrs": ["192.0.2.0/24"], "sshPubkeyFile": "k.pub"},
            "sshExposure": {"mode": "public"},
            "tailnet": {"mode": "none"},
        }
        fleet = {
            "schemaVersion": 1,
            "hosts": {
                name: {**host, "secrets": {key: {} for key in sorted(wired)}} for name, wired in self.hosts.items()
            },
        }
        if self.declared:
            keys = {"maren": MAREN.recipient, "lena": LENA.recipient}
            fleet["operators"] = {name: {"ageRecipient": keys[name]} for name in self.declared}
        path = self.root / "fleet" / "clawdlets.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(fleet))
        return load_project(self.root, {"USER": "maren", "PATH": os.environ["PATH"]})

    def new_value(self) -> str:
        self.made += 1
        return f"canary-value-{self.made:04d}"


# Each step changes the world's declarations and says what is to be run, with which values then being the right ones.


def init(host):
    def step(world):
        if host not in world.hosts:
            return None
        project = world.project()
        after = dict(world.values)
        for need in needs(host, project.fleet.host(host)):
            after.setdefault((host, need.name), HASH if need.password_name else world.new_value())
        given = {
            name: Secret(value) for (of, name), value in after.items() if of == host and (of, name) not in world.values
        }
        return after, lambda disk: init_host(world.project(), host, given, runner=world.runner, disk=disk)

    return step


def set_token(world):
    value = world.new_value()
    after = {**world.values, ("alpha", "token"): value}
    return after, lambda disk: changes.set_secret(
        world.project(), "alpha", "token", Secret(value), runner=world.runner, disk=disk
    )


def edit_token(world):
    value = world.new_value()
    after = {**world.values, ("alpha", "token"): value}

    def run(disk):
        draft = edit.begin(world.project(), "alpha", "token", runner=world.runner)
        return edit.save(world.project(), draft, Secret(value), runner=world.runner, disk=disk)

    return after, run


def reconcile(world):
    return needed(world), lambda disk: changes.reconcile(world.project(), runner=world.runner, disk=disk)


def rotate(world):
    return needed(world), lambda disk: changes.rotate_data_keys(world.project(), runner=world.runner, disk=disk)


def revoke_lena(world):
    return needed(world), lambda disk: changes.revoke(world.project(), "lena", runner=world.runner, disk=disk)


def needed(world):
    return {(host, name): value for (host, name), value in world.values.items() if is_needed(world, host, name)}


def is_needed(world, host, name):
    return host in world.hosts and (name.endswith("_hash") or name in world.hosts[host])


def lena_joins(world):
    folder = world.project().layout.operator_recipients_dir
    ensure_dir(folder, 0o755)
    (folder / "lena.age.pub").write_text(LENA.recipient + "\n")


def declare_maren(world):
    world.declared = ("maren",)


def declare_both(world):
    world.declared = ("maren", "lena")


def declare_nobody(world):
    world.declared = ()


def unwire(world):
    world.hosts["alpha"] = set()


def wire(world):
    world.hosts["alpha"] = {"token", "second"}


def beta_leaves(world):
    world.hosts.pop("beta", None)


def init_alpha(world):
    return init("alpha")(world)


def init_beta(world):
    return init("beta")(world)


EVERY = 6
"""Of the sequences that hypothesis makes, one crash point in so many is tried; of these here, every one."""

WHOLE = (
    [init_alpha, lena_joins, reconcile, revoke_lena, set_token, edit_token],
    [declare_both, init_alpha, declare_maren, reconcile, rotate],
    [wire, init_alpha, init_beta, unwire, beta_leaves, reconcile],
)
RUN = (init_alpha, init_beta, set_token, edit_token, reconcile, rotate, revoke_lena)
DECLARE = (lena_joins, declare_maren, declare_both, declare_nobody, unwire, wire, beta_leaves)


def saved(root: Path) -> dict[str, tuple[int, bytes | None]]:
    """The tree, to be compared or restored; lock files left out."""
    return {
        path.relative_to(root).as_posix(): (
            stat.S_IMODE(path.stat().st_mode),
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(root.rglob("*"))
        if "locks" not in path.parts
    }


def restore(root: Path, tree) -> None:
    shutil.rmtree(root)
    root.mkdir()
    for name, (mode, content) in tree.items():
        path = root / name
        if content is None:
            path.mkdir(mode=0o700)
        else:
            path.write_bytes(content)
        path.chmod(mode)


def sealed_files(root: Path) -> list[Path]:
    return [path for path in (root / "secrets").rglob("*.yaml") if not path.name.startswith(".")]


def look(world, before, after, allowed) -> None:
    """True at every moment, also right after the cut."""
    sops = Sops(world.runner, find_sops(world.runner))
    layout = world.project().layout
    for (host, name), value in before.items():
        if (host, name) in after:  # needed before and after: it is there, and readable, whatever happened
            got = sops.decrypt(layout.secret_file(host, name), identity=MAREN.secret)[name].reveal()
            assert got in (value, after[host, name])
    for path in sealed_files(world.root):
        assert recipients(path.read_text()) <= allowed, f"{path} over-shared"
    for path in world.root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            where = path.relative_to(world.root).as_posix()
            assert b"canary-value" not in content, where
            assert HASH.encode() not in content, where
            assert b"AGE-SECRET-KEY-1" not in content or where.startswith(".clawdlets/keys/operators/"), where
            assert b"OPENSSH PRIVATE" not in content, where


def look_closely(world, after, step) -> None:
    """True once the step has been run to its end."""
    project = world.project()
    layout = project.layout
    sops = Sops(world.runner, find_sops(world.runner))
    assert not list(world.root.rglob("*.tmp"))
    operators = set(operators_of(project).values())
    everything = step in (reconcile, rotate, revoke_lena)
    for (host, name), value in after.items():
        path = layout.secret_file(host, name)
        if not everything and not (step in (set_token, edit_token) and (host, name) == ("alpha", "token")):
            if not (step in (init_alpha, init_beta) and step is {"alpha": init_alpha, "beta": init_beta}[host]):
                continue
            if not is_needed(world, host, name):
                continue  # init reports what is no longer needed, and leaves it to reconcile
        assert sops.decrypt(path, identity=MAREN.secret)[name].reveal() == value
        assert recipients(path.read_text()) == operators | {declared_host(layout, host)}
    if everything:
        wanted = {layout.secret_file(host, name) for host, name in after}
        keys = {
            path for host in world.hosts for path in (layout.host_age_key_file(host), layout.host_ssh_key_file(host))
        }
        files = sealed_files(world.root)
        assert wanted <= set(files) <= wanted | keys
        for path in set(files) & keys:
            assert recipients(path.read_text()) == operators
        if LENA.recipient not in operators:
            for path in files:
                with pytest.raises(UnreadableError):
                    sops.decrypt(path, identity=LENA.secret)


def play(world: World, steps, tally: Counter, until: float, *, every: int = 1, start: int = 0, skip: int = 0) -> None:
    """Every step whole, and cut off after each of its file operations and in the middle of each write.

    ``every`` takes only one in so many of these points, beginning with number ``start``; the first ``skip`` steps are run whole only.
    """
    layout = world.project().layout
    ensure_dir(layout.operator_key("maren").parent)
    write_atomic(layout.operator_key("maren"), age.to_key_file(MAREN).reveal(), mode=0o600)
    readers = {MAREN.recipient, LENA.recipient}
    for number, step in enumerate(steps):
        if step in DECLARE:
            step(world)
            world.project()
            continue
        drawn = step(world)
        if drawn is None:
            continue
        after, run = drawn
        before = saved(world.root)
        hosts_before = {host: declared_host(layout, host) for host in ("alpha", "beta")}
        whole = CutDisk()
        try:
            run(whole.disk())
        except ClawdletsError:
            tally["refused"] += 1
            assert set(whole.kinds) <= {"sweep"}
            now = saved(world.root)
            assert {path for path in now if path.startswith("secrets/") and now[path] != before.get(path)} == set()
            continue
        look_closely(world, after, step)
        done = saved(world.root)
        points = [(-1, False)]
        points += [(at, False) for at in range(len(whole.kinds))]
        points += [(at, True) for at, kind in enumerate(whole.kinds) if kind == "write"]
        for at, torn in points[start::every] if number >= skip else ():
            if time.monotonic() > until:
                break
            restore(world.root, before)
            tally["points"] += 1
            tally[step.__name__] += 1
            with pytest.raises(Cut):
                run(CutDisk(at, torn).disk())
            keys = {declared_host(layout, host) for host in ("alpha", "beta")} | set(hosts_before.values())
            # an age key that was made before the cut is the host's, though its public half may not be there yet
            keys |= {reader for path in sealed_files(world.root) for reader in host_key_in(world, path)}
            look(world, world.values, after, readers | {key for key in keys if key})
            run(Disk())
            look(world, world.values, after, readers | {declared_host(layout, host) for host in ("alpha", "beta")})
            look_closely(world, after, step)
            assert set(saved(world.root)) == set(done), "other files than without the cut"
            if step is not rotate:
                again = saved(world.root)
                run(Disk())
                assert saved(world.root) == again, "a second run changed something"
        restore(world.root, done)
        if step in (reconcile, rotate, revoke_lena):
            world.values = after
        else:
            world.values = {**world.values, **after}
        if time.monotonic() > until:
            tally["out of time"] += 1
            return
    tally["sequences"] += 1


def host_key_in(world, path):
    if not path.name.endswith(".agekey.yaml"):
        return []
    opened = Sops(world.runner, find_sops(world.runner)).decrypt(path, identity=MAREN.secret)
    return [opened["age_public_key"].reveal()]


@pytest.fixture
def fast(monkeypatch):
    """No power is cut here, only runs: what was written is there without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def a_root() -> Path:
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(dir=memory if memory.is_dir() and os.access(memory, os.W_OK) else None))


@pytest.mark.timeout(180)
def test_any_sequence_cut_off_anywhere_is_finished_by_running_it_again(fast, capsys):
    tally: Counter[str] = Counter()
    until = time.monotonic() + BUDGET_S
    words = st.lists(st.sampled_from([*RUN, *DECLARE]), min_size=2, max_size=6)

    def sequence(steps, **points):
        if time.monotonic() > until:
            return
        root = a_root()
        try:
            play(World(root, StandIn()), steps, tally, until, **points)
        finally:
            shutil.rmtree(root)

    @settings(
        max_examples=200,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(words, st.integers(0, EVERY - 1))
    def sequences(steps, start):
        sequence([init_alpha, *steps], every=EVERY, start=start, skip=1)

    for steps in WHOLE:
        sequence(steps)
    sequences()
    with capsys.disabled():
        each = ", ".join(f"{step.__name__} {tally[step.__name__]}" for step in RUN)
        print(  # noqa: T201 - the count is what this test is for
            f"\n{tally['sequences']} sequences, {tally['points']} crash points ({each}), {tally['refused']} steps refused: "
            "0 lost, 0 in clear, 0 over-shared, 0 not finished by the next run"
        )
    assert tally["points"] >= 100  # how far it gets in its time is the machine's; none failed on the way


def test_the_same_on_the_real_sops(tmp_path, fast):
    tally: Counter[str] = Counter()
    root = tmp_path / "project"
    root.mkdir()
    world = World(root, LocalRunner(os.environ), hosts={"alpha": {"token"}})
    until = time.monotonic() + 12
    play(world, [init_alpha, lena_joins, reconcile, revoke_lena], tally, until)
    assert tally["points"] >= 10


def test_the_stand_in_does_what_the_real_sops_does():
    stranger = age.generate()
    for runner in (StandIn(), LocalRunner(os.environ)):
        sops = Sops(runner, find_sops(runner))
        plaintext = {"token": Secret("canary-value"), "other": Secret("a\nb\u00e9")}
        text = sops.encrypt(plaintext, recipients={MAREN.recipient, LENA.recipient}, filename="x")
        assert recipients(text) == {MAREN.recipient, LENA.recipient}
        assert "canary" not in text
        assert sops.decrypt(text, identity=LENA.secret) == plaintext
        with pytest.raises(UnreadableError):
            sops.decrypt(text, identity=stranger.secret)
        assert text != sops.encrypt(plaintext, recipients={MAREN.recipient, LENA.recipient}, filename="x")
