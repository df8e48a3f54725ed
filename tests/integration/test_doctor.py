"""clawdlets doctor: a clean project is green, and every check has a fault that turns exactly that id red."""

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from clawdlets_ops import age
from clawdlets_ops.cattle.labels import Brand
from clawdlets_ops.doctor import deployed
from clawdlets_ops.doctor.catalogue import CATALOGUE
from clawdlets_ops.doctor.snapshot import Scope
from clawdlets_ops.errors import SettingsError
from clawdlets_ops.finding import State
from clawdlets_ops.hetzner import WINDOW_LABEL, Firewall
from clawdlets_ops.lockdown import HostExposure
from clawdlets_ops.secrets import changes
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.testing import FakeCloud
from tests.guard_corpus import Maker
from tests.integration.doctor_project import (
    DEPENDABOT,
    HASH,
    HOST,
    LOCK,
    LOCKED,
    SECRET,
    SETTING,
    Patient,
    ids,
    make,
    server,
)

pytestmark = pytest.mark.integration

SCOPE = {check.id: check.scope for check in CATALOGUE}
OF_CATTLE = {"CAT-02", "UD-05"}
"""What is not applicable to a fleet without cattle."""
ALPHA = "secrets/hosts/alpha/discord_token.yaml"


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return make(tmp_path_factory.mktemp("clean"))


@pytest.fixture
def patient(clean, tmp_path):
    """A copy to be spoilt."""
    shutil.copytree(clean.base, tmp_path / "x", symlinks=True)
    return Patient(tmp_path / "x")


class Refusing(FakeCloud):
    """A stand-in for an API that does not accept the token."""

    def server(self, name):
        raise SettingsError("the API does not accept this token", where="HCLOUD_TOKEN")


@dataclass(frozen=True)
class Fault:
    """``unknown`` are the ids that can no longer be told because of it."""

    id: str
    seed: Callable[[Patient], object]
    unknown: frozenset[str] = frozenset()
    scope: Scope | None = None


def _tampered(patient):
    path = patient.root / ALPHA
    text = path.read_text()
    at = text.index("data:") + 5
    path.write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])


def _for_another_host(patient):
    """The metadata name the host, and the key inside is for somebody else."""
    other, host = age.generate().recipient, patient.recipient("hosts/alpha")
    text = patient.encrypt(ALPHA, {"discord_token": SECRET}, [patient.recipient("operators/maren"), other])
    (patient.root / ALPHA).write_text(text.replace(other, host))


def _from_history(patient):
    patient.write("notes.txt", f"key = {Maker().tailscale()}\n")
    patient.commit("notes.txt")
    patient.git("rm", "-q", "notes.txt")
    patient.git("commit", "-q", "--no-verify", "-m", "canary")


def _once_tracked(patient):
    patient.write(".clawdlets/note", "nothing\n", 0o600)
    patient.commit(".clawdlets/note")
    patient.git("rm", "-q", "--cached", ".clawdlets/note")
    patient.git("commit", "-q", "--no-verify", "-m", "canary")


def _only_here_ignored(patient):
    patient.git("rm", "-q", ".gitignore")
    patient.write(".git/info/exclude", "/.clawdlets/\n")


def _partly_encrypted(patient):
    text = patient.encrypt("secrets/other.yaml", {"other": SECRET}, [patient.recipient("operators/maren")])
    patient.write("secrets/other.yaml", f"more: canary-in-clear\n{text}")


def _staged_in_clear(patient):
    patient.write("secrets/other.yaml", "other: canary-in-clear\n")
    patient.git("add", "secrets/other.yaml")
    (patient.root / "secrets/other.yaml").unlink()


def _foreign_reader(patient):
    readers = [patient.recipient("operators/maren"), patient.recipient("hosts/alpha"), age.generate().recipient]
    patient.encrypt(ALPHA, {"discord_token": SECRET}, readers)


def _missing_reader(patient):
    patient.encrypt(ALPHA, {"discord_token": SECRET}, [patient.recipient("operators/maren")])


def _lock(patient, **fields):
    nixpkgs = {"locked": {**LOCK["nodes"]["nixpkgs"]["locked"], **fields}}
    patient.write("flake.lock", json.dumps({**LOCK, "nodes": {**LOCK["nodes"], "nixpkgs": nixpkgs}}))


def _declared_operators(patient):
    patient.fleet(operators={"maren": {"ageRecipient": patient.recipient("operators/maren")}})


def _workflow(patient, step):
    patient.write(".github/workflows/ci.yml", f"jobs:\n  a:\n    steps:\n      - {step}\n")
    patient.git("add", ".github")


def _verified(patient):
    patient.receipt()
    patient.write(".clawdlets/reports/alpha/20260101T000000Z/report.json", '{"exitCode": 0}', 0o600)


def _served(patient):
    path = patient.project.layout.state_file("payload-alpha")
    path.write_text(json.dumps({**json.loads(path.read_text()), "verified": True}))


def _set(patient, value):
    return changes.set_secret(
        patient.project, "alpha", "discord_token", Secret(value, "discord_token"), runner=patient.runner
    )


def _closure(patient):
    patient.write("../closure/abc-system/etc/app.conf", f"token={SECRET}\n")
    patient.write("../closure.txt", f"{patient.base / 'closure' / 'abc-system'}\n")
    patient.closure = patient.base / "closure.txt"


def _store(patient):
    planted = patient.write("../store/made-here", f"password={SETTING}\n")
    clean = patient.write("../store/from-cache", f"password={SETTING}\n")
    listing = {str(planted): {"signatures": []}, str(clean): {"signatures": ["cache.nixos.org-1:x"]}}
    patient.nix(listing)


def _few_bytes(patient):
    patient.edit.append(lambda snapshot: replace(snapshot, bench=replace(snapshot.bench, free_bytes=1024)))


def _symlink(patient):
    (patient.root / ".clawdlets/runs").symlink_to("/nowhere")


SECRETS = frozenset({"SOP-03", "SOP-05", "SOP-06", "SOP-08"})
NOT_OPENED = frozenset({"GIT-05"})
"""A value that cannot be read cannot be looked for."""
NO_PROJECT = frozenset({"SOP-04", "SOP-09", "HCL-01", "KEY-01", "KEY-02"})
FAULTS = [
    Fault("FLT-01", lambda p: p.write("fleet/clawdlets.json", "{"),
          SECRETS | NO_PROJECT | {"EXP-08", "SOP-07", "SSH-09", "ENV-01", "RTD-02", "RTD-05", "DRF-01", "DRF-02", "DRF-03", "WIN-01", "WIN-02"}, Scope.DEPLOY),
    Fault("EXP-08", lambda p: p.fleet(hosts={"alpha": {**HOST, "sshExposure": {"mode": "bootstrap"}}})),
    Fault("GIT-01", lambda p: p.git("rm", "-q", "--cached", ".gitignore")),
    Fault("GIT-01", _only_here_ignored),
    Fault("GIT-01", lambda p: p.write(".gitignore", "/.clawdlets/[!x]*\n")),
    Fault("GIT-02", lambda p: p.write(".clawdlets/note", "nothing\n") and p.git("add", "-f", ".clawdlets/note")),
    Fault("GIT-02", _once_tracked),
    Fault("GIT-03", lambda p: p.write("notes.txt", f"key = {Maker().tailscale()}\n")),
    Fault("GIT-04", _from_history),
    Fault("GIT-05", lambda p: p.write("notes.txt", f"{SETTING}\n".encode().hex())),
    Fault("GIT-05", lambda p: p.write("notes.txt", base64.b64encode(SECRET.encode()))),
    Fault("GIT-06", lambda p: p.fleet(**{"$comment": Maker().tailscale()})),
    Fault("GIT-07", lambda p: (p.root / ".git/hooks/pre-push").unlink()),
    Fault("GIT-07", lambda p: (p.root / ".git/hooks/pre-commit").chmod(0o644)),
    Fault("SOP-01", lambda p: p.write("secrets/other.yaml", "other: canary-in-clear\n"), NOT_OPENED),
    Fault("SOP-01", lambda p: (p.root / "secrets/other.yaml").symlink_to("/etc/hostname"), NOT_OPENED),
    Fault("SOP-01", _staged_in_clear),
    Fault("SOP-02", _partly_encrypted, NOT_OPENED),
    Fault("SOP-03", _foreign_reader),
    Fault("SOP-03", _missing_reader),
    Fault("SOP-05", lambda p: (p.root / ALPHA).unlink()),
    Fault("SOP-05", lambda p: _foreign_value(p, "CHANGEME")),
    Fault("SOP-06", lambda p: _stale(p)),
    Fault("SOP-07", lambda p: (p.root / "secrets/keys/hosts/alpha.age.pub").unlink(), frozenset({"SOP-03", "SOP-08"})),
    Fault("SOP-07", lambda p: p.write("secrets/keys/hosts/gone.age.pub", age.generate().recipient)),
    Fault("SOP-07", lambda p: _declared_operators(p) or (p.root / "secrets/keys/operators/maren.age.pub").unlink()),
    Fault("SOP-07", lambda p: _declared_operators(p) or p.write("secrets/keys/operators/lena.age.pub", age.generate().recipient)),
    Fault("SOP-08", lambda p: p.write("secrets/.sops.yaml", "creation_rules: []\n")),
    Fault("SSH-09", lambda p: (p.root / "secrets/keys/hosts/alpha.ssh_host_ed25519_key.pub").unlink()),
    Fault("SSH-09", lambda p: shutil.copy(p.base / "home/id_ed25519.pub",
                                          p.root / "secrets/keys/hosts/alpha.ssh_host_ed25519_key.pub")),
    Fault("STO-07", lambda p: p.write("Makefile", "x:\n\tnix build path:./nix#x\n") and p.git("add", "Makefile")),
    Fault("SUP-01", lambda p: _workflow(p, "uses: actions/checkout@v4")),
    Fault("SUP-01", lambda p: _workflow(p, "uses: docker://alpine:3.20")),
    Fault("SUP-02", lambda p: p.git("rm", "-q", ".github/dependabot.yml")),
    Fault("SUP-02", lambda p: p.write(".github/dependabot.yml", DEPENDABOT.replace("weekly", "monthly")) and p.git("add", ".")),
    Fault("SUP-03", lambda p: _workflow(p, "run: gh pr merge --auto 7")),
    Fault("SUP-05", lambda p: _lock(p, narHash="")),
    Fault("SUP-05", lambda p: _lock(p, rev="")),
    Fault("SUP-05", lambda p: _lock(p, type="path")),
    Fault("SUP-05", lambda p: (p.root / "flake.lock").unlink()),
    Fault("SUP-05", lambda p: p.git("rm", "-q", "--cached", "flake.lock")),
    Fault("ENV-01", lambda p: p.write(".clawdlets/vantages.json", "{}[", 0o600), SECRETS | NO_PROJECT),
    Fault("TOOL-01", lambda p: p.program("tofu", "OpenTofu v1.5.0")),
    Fault("TOOL-01", lambda p: (p.base / "bin/nixos-anywhere").unlink()),
    Fault("HCL-01", lambda p: setattr(p, "cloud", Refusing())),
    Fault("KEY-01", lambda p: (p.base / "home/id_ed25519").chmod(0o644)),
    Fault("KEY-02", lambda p: (p.root / ".clawdlets/keys/operators/maren.agekey").unlink(), frozenset({"SOP-04", "SOP-09"})),
    Fault("SOP-04", _tampered, frozenset({"SOP-05", "SOP-09"}) | NOT_OPENED),
    Fault("SOP-09", _for_another_host),
    Fault("RTD-01", lambda p: (p.root / ".clawdlets/keys").chmod(0o755)),
    Fault("RTD-01", lambda p: p.write(".clawdlets/runs/x.jsonl", "{}", 0o640)),
    Fault("RTD-01", _symlink),
    Fault("RTD-06", lambda p: p.root.chmod(0o777)),
    Fault("RTD-06", lambda p: (p.root / "secrets").chmod(0o777)),
    Fault("RTD-06", lambda p: (p.root / "fleet/clawdlets.json").chmod(0o666)),
    Fault("RTD-03", lambda p: p.write(".clawdlets/infra/opentofu/alpha/terraform.tfstate", f'"{SECRET}"', 0o600)),
    Fault("RTD-03", lambda p: (p.root / ".clawdlets/infra/opentofu/alpha/terraform.tfstate").chmod(0o644)),
    Fault("SYS-01", _few_bytes),
    Fault("RTD-02", lambda p: p.write(".clawdlets/extra-files/alpha/var/lib/clawdlets/secrets/hosts/beta/x.yaml", "x"),
          frozenset({"DRF-01"})),
    Fault("RTD-02", lambda p: (p.root / ".clawdlets/extra-files/alpha/var/lib/sops-nix/key.txt").chmod(0o444),
          frozenset({"DRF-01"})),
    Fault("RTD-05", _verified),
    Fault("RTD-05", _served),
    Fault("RTD-05", lambda p: p.write(".clawdlets/state/.secrets-alpha.json.0123456789ab.tmp", "x", 0o600)),
    Fault("RTD-05", lambda p: p.write(".clawdlets/state/.provision-alpha.json.0123456789ab.tmp", "x", 0o600)),
    Fault("DRF-01", lambda p: _set(p, "canary-discord-0009")),
    Fault("DRF-03", lambda p: setattr(p, "door", replace(LOCKED, host=HostExposure("bootstrap", armed=False)))),
    Fault("DRF-03", lambda p: setattr(p, "door", replace(LOCKED, status="pending"))),
    Fault("WIN-01", lambda p: setattr(p, "door", replace(LOCKED, unfinished="2026-11-27T00:00:00+00:00"))),
    Fault("WIN-02", lambda p: setattr(p, "door", replace(LOCKED, edge=Firewall(3, "e", {WINDOW_LABEL: "20991231T000000Z"}, ())))),
    Fault("DRF-02", lambda p: p.receipt(hostKey="SHA256:another")),
    Fault("STO-01", _closure),
    Fault("STO-05", _store),
    Fault("CAT-01", lambda p: setattr(p, "cloud", FakeCloud(servers=[server(purpose="canary")]))),
    Fault("CAT-02", lambda p: _cattle(p, "minted", without="clawdlets-ttl")),
    Fault("CAT-02", lambda p: _cattle(p, "minted", of="beta")),
    Fault("CAT-02", lambda p: _cattle(p, "minted", enabled=False)),
    Fault("UD-05", lambda p: _cattle(p, "static")),
]  # fmt: skip


def _cattle(patient, key, without="", of="alpha", enabled=True):
    alpha = {**HOST, "tailnet": {"mode": "tailscale"}}
    patient.fleet(hosts={"alpha": alpha}, cattle={"enabled": enabled, "host": "alpha", "tailnet": {"key": key}})
    brand = Brand(of, "0f9c2a34-5b6d-4e7f-8a9b-0c1d2e3f4a5b", "0123456789abcdef", "rex", "maren", 60, 1_800_000_000)
    labels = {name: value for name, value in brand.labels({}).items() if name != without}
    one = replace(server(), id=77, name="cattle-rex-0f9c2a345b6d", labels=labels)
    patient.cloud = FakeCloud(servers=[server(), one])


def _foreign_value(patient, value):
    readers = [patient.recipient("operators/maren"), patient.recipient("hosts/alpha")]
    patient.encrypt(ALPHA, {"discord_token": value}, readers)


def _stale(patient):
    readers = [patient.recipient("operators/maren"), patient.recipient("hosts/alpha")]
    patient.encrypt("secrets/hosts/alpha/old_token.yaml", {"old_token": SECRET}, readers)


@pytest.mark.parametrize("scope", Scope)
def test_a_clean_project_is_green_in_every_scope(patient, scope):
    found = patient.diagnose(scope)
    assert ids(found, State.FAIL) == ids(found, State.UNKNOWN) == set(), [each.finding for each in found.judged]
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 0)


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{number}-{fault.id}" for number, fault in enumerate(FAULTS)])
def test_a_seeded_fault_turns_exactly_that_check_red(patient, fault, monkeypatch):
    monkeypatch.setattr(deployed, "STORE", patient.base)
    fault.seed(patient)
    found = patient.diagnose(fault.scope or SCOPE[fault.id])
    assert ids(found, State.FAIL) == {fault.id}, [each.finding for each in found.judged]
    assert ids(found, State.UNKNOWN) == fault.unknown
    red = [each.finding for each in found.judged if each.finding.state is State.FAIL]
    assert all(finding.observed and finding.fix for finding in red)


def test_every_check_has_a_red_test(patient):
    assert {fault.id for fault in FAULTS} == set(SCOPE)
    assert ids(patient.diagnose(Scope.CATTLE), State.NOT_APPLICABLE) == OF_CATTLE


def test_half_a_report_of_a_killed_verification_is_no_key_in_clear(patient):
    for folder in ("reports/_fleet/20260101T000000Z", "runs/20260101T000000-0a0a", "lockdown/alpha"):
        patient.write(f".clawdlets/{folder}/.report.json.0123456789ab.tmp", "{", 0o600)
    assert "RTD-05" not in ids(patient.diagnose(Scope.DEPLOY), State.FAIL)


def test_cattle_with_all_labels_and_minted_keys_is_green(patient):
    _cattle(patient, "minted")
    found = patient.diagnose(Scope.CATTLE)
    assert ids(found, State.PASS) >= OF_CATTLE, [each.finding for each in found.judged]


def test_a_host_installed_with_an_older_set_is_unknown_not_current(patient):
    _served(patient)
    shutil.rmtree(patient.root / ".clawdlets/extra-files/alpha")
    assert ids(patient.diagnose(Scope.DEPLOY), State.UNKNOWN) == set()
    _set(patient, "canary-discord-0009")
    found = patient.diagnose(Scope.DEPLOY)
    assert (ids(found, State.FAIL), ids(found, State.UNKNOWN)) == (set(), {"DRF-01"})


def test_a_known_secret_that_cannot_be_read_is_a_gap_of_its_own_check_alone(patient):
    patient.write(".clawdlets/keys/other.key", b"\xff\xfe", 0o600)
    found = patient.diagnose(Scope.REPO)
    assert (ids(found, State.FAIL), ids(found, State.UNKNOWN)) == (set(), {"GIT-05"})


def test_while_a_host_key_is_rotated_both_keys_are_readers(patient):
    coming = age.generate().recipient
    patient.write("secrets/keys/next/alpha.age.pub", coming)
    readers = [patient.recipient("operators/maren"), patient.recipient("hosts/alpha"), coming]
    hashes = ("admin_password_hash", "breakglass_password_hash")
    for name, value in ((hashes[0], HASH), (hashes[1], HASH), ("discord_token", SECRET)):
        patient.encrypt(f"secrets/hosts/alpha/{name}.yaml", {name: value}, readers)
    patient.git("add", "secrets")
    assert ids(patient.diagnose(Scope.REPO), State.FAIL) == set()
