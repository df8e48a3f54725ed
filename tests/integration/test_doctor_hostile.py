"""clawdlets doctor where things are odd: it says what it could not see, goes on with the rest, and changes nothing."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from clawdlets_ops.doctor import bench
from clawdlets_ops.doctor.catalogue import reference
from clawdlets_ops.doctor.observe import observe
from clawdlets_ops.doctor.run import as_json, judge, text
from clawdlets_ops.doctor.snapshot import Scope
from clawdlets_ops.errors import FleetError
from clawdlets_ops.finding import State
from tests.guard_corpus import Maker
from tests.integration.doctor_project import HASH, HOST, SECRET, SETTING, Patient, ids, make

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
GIT_CHECKS = {*(f"GIT-0{number}" for number in range(1, 8)), "STO-07", "SUP-01", "SUP-02", "SUP-03"}
PROGRAM = "import os, sys\nsys.argv[0] = 'clawdlets'\nfrom clawdlets_ops import cli\ncli.main()\n"


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return make(tmp_path_factory.mktemp("clean"))


@pytest.fixture
def patient(clean, tmp_path):
    shutil.copytree(clean.base, tmp_path / "x", symlinks=True)
    return Patient(tmp_path / "x")


def everything(root: Path) -> dict[str, tuple]:
    """Mode, size, inode, time of change and content of all that is below ``root``."""
    found = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        found[str(path.relative_to(root))] = (info.st_mode, info.st_size, info.st_ino, info.st_mtime_ns, content)
    return found


def clawdlets(patient, *words):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--project", patient.root, "doctor", *words],
        env={**patient.environ, "PYTHONPATH": str(ROOT), "HCLOUD_ENDPOINT": closed_endpoint()},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def closed_endpoint() -> str:
    """An address on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


def spoil(patient) -> None:
    """A fault in every corner, with real values in it."""
    patient.write("notes.txt", f"{SECRET}\n{SETTING}\n{Maker().tailscale()}\n")
    patient.write("secrets/other.yaml", f"other: {SECRET}\n")
    patient.write("secrets/hosts/alpha/discord_token.yaml", f"discord_token: {SECRET}\n")
    patient.write(".clawdlets/infra/opentofu/alpha/terraform.tfstate", f'"{SETTING}"', 0o644)
    patient.write(".clawdlets/vantages.json", f'[{{"name": "{SETTING}"}}]', 0o600)
    patient.write("flake.lock", SETTING)


def test_nothing_is_written_and_nothing_changes(patient):
    before = everything(patient.base)
    patient.look(Scope.DEPLOY)
    patient.look(Scope.CATTLE)
    assert everything(patient.base) == before


def test_no_form_of_the_report_holds_a_secret(patient):
    spoil(patient)
    found = patient.diagnose(Scope.DEPLOY)
    assert {"GIT-03", "SOP-01", "RTD-03", "ENV-01"} <= ids(found, State.FAIL)
    shown = text(found) + as_json(found, strict=True)
    private = (patient.root / ".clawdlets/keys/operators/maren.agekey").read_text().splitlines()[-1]
    for secret in (SECRET, SETTING, HASH, private, "canary7Q"):
        assert secret in f"{SECRET}{SETTING}{HASH}{private}canary7Q"
        assert secret not in shown


def test_a_broken_fleet_file_hides_nothing_else(patient):
    patient.write("fleet/clawdlets.json", '{"schemaVersion": 1, "hosts": {"alpha": {"systen": "x"}}}')
    spoil(patient)
    found = patient.diagnose(Scope.DEPLOY)
    assert {"FLT-01", "GIT-03", "SOP-01", "RTD-03", "SUP-05"} <= ids(found, State.FAIL)
    assert "did you mean 'system'" in text(found)


def test_a_folder_that_is_no_project_at_all(tmp_path):
    found = judge(observe(tmp_path, Scope.DEPLOY, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}), Scope.DEPLOY)
    assert "FLT-01" in ids(found, State.FAIL)
    assert ids(found, State.UNKNOWN) >= GIT_CHECKS
    assert found.exit_code() == 1


def test_without_git_what_git_knows_is_unknown(patient, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("ssh", "cat"):
        (programs / name).symlink_to(shutil.which(name))
    environ = {**patient.environ, "PATH": str(programs)}
    found = judge(observe(patient.root, Scope.REPO, environ), Scope.REPO)
    assert ids(found, State.UNKNOWN) >= GIT_CHECKS
    assert ids(found, State.FAIL) == set()
    assert found.exit_code() == 2


def test_without_a_checkout_what_git_knows_is_unknown(patient):
    shutil.rmtree(patient.root / ".git")
    found = patient.diagnose(Scope.REPO)
    assert (ids(found, State.UNKNOWN), ids(found, State.FAIL)) == (GIT_CHECKS, set())


@pytest.mark.parametrize("damage", ["head", "object", "index"])
def test_a_damaged_repository_is_not_clean(patient, damage):
    if damage == "head":
        patient.write(".git/HEAD", "nonsense\n")
    elif damage == "index":
        patient.write(".git/index", "nonsense\n")
    else:
        oid = patient.git("rev-parse", ":flake.nix").strip()
        (patient.root / ".git/objects" / oid[:2] / oid[2:]).unlink()
    found = patient.diagnose(Scope.REPO)
    assert "GIT-03" in ids(found, State.UNKNOWN)
    assert found.exit_code() != 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a repository to somebody else")
def test_a_repository_of_another_user_is_unknown(patient):
    os.chown(patient.root / ".git", 12345, 12345)
    os.chown(patient.root, 12345, 12345)
    assert "GIT-03" in ids(patient.diagnose(Scope.REPO), State.UNKNOWN)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_file_of_another_user_in_the_runtime_dir_is_red(patient):
    os.chown(patient.root / ".clawdlets/state", 12345, -1)
    assert ids(patient.diagnose(Scope.BOOTSTRAP), State.FAIL) == {"RTD-01"}


def test_a_shallow_clone_does_not_know_its_history(patient, tmp_path):
    patient.write("README.md", "canary\n")
    patient.commit("README.md")
    shallow = Patient(tmp_path / "shallow")
    shutil.copytree(patient.base, shallow.base, symlinks=True, ignore=lambda folder, names: {"project"} & set(names))
    patient.git("clone", "-q", "--depth=1", f"file://{patient.root}", str(shallow.root))
    found = shallow.diagnose(Scope.REPO)
    assert ids(found, State.UNKNOWN) == {"GIT-02", "GIT-04", "GIT-05"}
    assert ids(found, State.FAIL) == {"GIT-07"}
    assert found.exit_code() == 2  # hooks are a warning


def test_a_clone_needs_nothing_else_for_the_scope_repo(patient, tmp_path):
    clone = Patient(tmp_path / "clone")
    shutil.copytree(patient.base, clone.base, symlinks=True, ignore=lambda folder, names: {"project"} & set(names))
    patient.git("clone", "-q", str(patient.root), str(clone.root))
    found = clone.diagnose(Scope.REPO)
    assert (ids(found, State.FAIL), ids(found, State.UNKNOWN)) == ({"GIT-07"}, set())
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 1)


def test_a_linked_worktree_and_a_project_below_the_top(patient):
    patient.git("worktree", "add", "-q", "../linked")
    linked = judge(observe(patient.base / "linked", Scope.REPO, patient.environ), Scope.REPO)
    assert (ids(linked, State.FAIL), ids(linked, State.UNKNOWN)) == (set(), set())
    below = patient.base / "linked" / "projects" / "one"
    shutil.copytree(patient.root / "fleet", below / "fleet")
    shutil.copytree(patient.root / "secrets", below / "secrets")
    (below / "secrets/other.yaml").write_text("other: canary-in-clear\n")
    subprocess.run(["git", "add", "-f", "."], cwd=below, check=True)
    (below / "secrets/other.yaml").unlink()
    found = judge(observe(below, Scope.REPO, patient.environ), Scope.REPO)
    assert ids(found, State.FAIL) == {"SOP-01", "GIT-01"}  # the rule of the top is about the top's own runtime dir


def test_a_runtime_dir_that_is_a_link_is_red_and_not_followed(patient, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (patient.root / ".clawdlets").rename(elsewhere)
    (patient.root / ".clawdlets").symlink_to(elsewhere)
    found = patient.diagnose(Scope.BOOTSTRAP)
    assert "RTD-01" in ids(found, State.FAIL)
    assert "is a symbolic link" in text(found)


def test_devices_sockets_and_names_that_are_no_text(patient):
    os.mkfifo(patient.root / "secrets/pipe.yaml")
    os.mkfifo(patient.root / ".clawdlets/pipe", 0o600)
    (Path(os.fsdecode(os.fsencode(patient.root) + b"/secrets/\xff\xfe.yaml"))).write_bytes(b"x: \xff\xfe\n")
    patient.write("notes\x1b[2J.txt", f"key = {Maker().tailscale()}\n")
    found = patient.diagnose(Scope.BOOTSTRAP)
    assert {"GIT-03", "SOP-01"} <= ids(found, State.FAIL)
    assert "\x1b" not in text(found)
    json.loads(as_json(found, strict=False).encode())


def test_thousands_of_files_are_looked_at(patient):
    for number in range(3000):
        patient.write(f"many/{number % 30}/{number}.txt", f"canary {number}\n")
    patient.write("many/7/hidden.txt", f"key = {Maker().tailscale()}\n")
    assert ids(patient.diagnose(Scope.REPO), State.FAIL) == {"GIT-03"}


def test_the_labs_machines_are_no_part_of_the_runtime_dir(patient, monkeypatch):
    """Whole file systems: to count them among the paths would end in "unknown", or take minutes."""
    monkeypatch.setattr(bench, "MAX_PATHS", 200)
    machine = patient.root / ".clawdlets" / "lab" / "machines" / "alpha"
    machine.mkdir(mode=0o700, parents=True)
    (patient.root / ".clawdlets" / "lab").chmod(0o700)
    for number in range(300):
        (machine / f"{number}").touch(mode=0o644)
    assert "RTD-01" not in ids(patient.diagnose(Scope.BOOTSTRAP), State.FAIL) | ids(
        patient.diagnose(Scope.BOOTSTRAP), State.UNKNOWN
    )
    (patient.root / ".clawdlets" / "lab").chmod(0o755)
    assert "RTD-01" in ids(patient.diagnose(Scope.BOOTSTRAP), State.FAIL)
    for number in range(300):
        patient.write(f".clawdlets/many/{number}", "", 0o600)
    assert "RTD-01" in ids(patient.diagnose(Scope.BOOTSTRAP), State.UNKNOWN)


def test_an_unknown_host_is_refused_by_name(patient):
    patient.hosts = ["alpa"]
    with pytest.raises(FleetError, match="did you mean 'alpha'"):
        patient.look(Scope.REPO)


def test_only_the_named_host_is_looked_at(patient):
    patient.fleet(hosts={"alpha": HOST, "beta": HOST})
    assert {"SOP-05", "SOP-07", "SSH-09"} <= ids(patient.diagnose(Scope.REPO), State.FAIL)
    patient.hosts = ["alpha"]
    found = patient.diagnose(Scope.REPO)
    assert ids(found, State.FAIL) == set()
    assert {each.finding.host for each in found.judged} == {"", "alpha"}


def test_the_command_its_forms_and_its_exit_status(patient):
    done = clawdlets(patient, "--scope", "repo")
    assert (done.returncode, done.stderr) == (0, "")
    assert "doctor (repo): " in done.stdout
    (patient.root / ".git/hooks/pre-push").unlink()
    assert clawdlets(patient, "--scope", "repo").returncode == 0
    strict = clawdlets(patient, "--scope", "repo", "--strict", "--json")
    document = json.loads(strict.stdout)
    assert (strict.returncode, document["exitCode"], document["strict"]) == (1, 1, True)
    red = [found for found in document["findings"] if found["state"] == "fail"]
    assert [(found["check"], found["warning"]) for found in red] == [("GIT-07", True)]
    assert clawdlets(patient, "--scope", "repo", "--host", "nobody").returncode == 1


def test_an_api_that_does_not_answer_leaves_the_token_unknown(patient):
    done = clawdlets(patient, "--scope", "bootstrap", "--json")
    document = json.loads(done.stdout)
    token = next(found for found in document["findings"] if found["check"] == "HCL-01")
    assert token["state"] == "unknown"
    assert "does not answer" in token["observed"]
    assert done.returncode == 2


def test_the_reference_is_printed_from_the_catalogue():
    assert (ROOT / "docs/reference/doctor.md").read_text() == reference()
