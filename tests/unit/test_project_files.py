"""The project's own files agree with each other: what is declared twice says the same, what must be ignored is ignored."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from pyinfra.api.metadata import parse_plugins

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = ("run", "test", "tools")


def _declared(name: str) -> list[str]:
    """The requirements of requirements/<name>.in itself, without its options and comments."""
    lines = (ROOT / f"requirements/{name}.in").read_text().splitlines()
    return sorted((line for line in lines if line and line[0] not in "-#"), key=str.lower)


def _pins(name: str) -> dict[str, str]:
    """Version of each distribution in requirements/<name>.txt, by its normalised name."""
    text = (ROOT / f"requirements/{name}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)(?: ; [^\\\n]+)? \\$", text, flags=re.MULTILINE))


def _run(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )


def test_the_requirements_are_those_of_pyproject() -> None:
    project = PYPROJECT["project"]
    assert _declared("run") == sorted(project["dependencies"], key=str.lower)
    # The project is installed without build isolation, so what builds it must be among the pins: also what hatchling
    # asks for only once it builds an editable install.
    build = [*PYPROJECT["build-system"]["requires"], "editables>=0.5"]
    extras = [*project["optional-dependencies"]["test"], *project["optional-dependencies"]["orchestrator"]]
    assert _declared("test") == sorted([*build, *extras], key=str.lower)


@pytest.mark.parametrize("name", PINNED)
def test_every_requirement_is_pinned_by_hash_and_names_no_index(name: str) -> None:
    text = (ROOT / f"requirements/{name}.txt").read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-{1,2}(?!hash=)\w", text, flags=re.MULTILINE)
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(_pins(name)) > 0
    assert [
        block.split()[0] for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}$", block, re.MULTILINE)
    ] == []


def test_what_users_run_is_what_was_tested() -> None:
    tested = _pins("test")
    assert {name: version for name, version in _pins("run").items() if tested.get(name) != version} == {}


def test_every_declared_requirement_is_pinned() -> None:
    for name in PINNED:
        wanted = {re.split(r"[<>=!~\[ ]", line)[0].lower() for line in _declared(name)}
        assert wanted - set(_pins(name)) == set()


def test_the_tools_module_builds_the_two_programs_with_opentofus_own_hcl() -> None:
    text = (ROOT / "tools/go.mod").read_text()
    assert "github.com/opentofu/opentofu/cmd/tofu\n" in text
    assert re.search(r"^\tgithub.com/opentofu/opentofu v\d", text, re.MULTILINE)
    assert re.search(r"^\tgithub.com/hetznercloud/terraform-provider-hcloud v\d", text, re.MULTILINE)
    replaced = re.search(r"^replace (\S+) => (\S+) (\S+)$", text, re.MULTILINE)
    assert replaced
    assert replaced.group(1, 2) == ("github.com/hashicorp/hcl/v2", "github.com/opentofu/hcl/v2")
    assert f"github.com/opentofu/hcl/v2 {replaced.group(3)} h1:" in (ROOT / "tools/go.sum").read_text()


def test_pyinfra_can_read_our_plugins_and_finds_them() -> None:
    plugins = parse_plugins((ROOT / "pyinfra-metadata.toml").read_text())
    assert {plugin.type for plugin in plugins} == {"connector", "fact", "operation", "deploy"}
    assert [plugin.path for plugin in plugins if not (ROOT / plugin.path).exists()] == []


def test_keys_and_state_are_ignored_and_sources_are_not(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    assert _run("git", "init", "-q", ".", cwd=tmp_path).returncode == 0
    ignored = [
        ".clawdlets/keys/operators/a.agekey",
        ".clawdlets/extra-files/alpha/var/lib/sops-nix/key.txt",
        ".clawdlets/infra/opentofu/alpha/terraform.tfstate",
        "secrets/hosts/alpha/password.yaml",
        "somewhere/else/operator.agekey",
        "somewhere/terraform.tfstate.backup",
        ".venv/bin/python",
        ".cache/lab/base/etc/passwd",
        "clawdlets_ops/__pycache__/errors.cpython-311.pyc",
        "dist/clawdlets_ops-0.1.0.tar.gz",
    ]
    kept = ["clawdlets_ops/secrets/plan.py", "clawdlets_ops/tofu.py", "fleet/clawdlets.json", "tools/go.sum", ".ci/run"]
    found = _run("git", "check-ignore", "--no-index", *ignored, *kept, cwd=tmp_path)
    assert found.stdout.splitlines() == ignored, found.stderr


def _scaffold(tmp_path: Path) -> Path:
    """A checkout with only what `make clean` and `make help` need."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "tools/prepare", tmp_path / "tools/prepare")
    return tmp_path


def test_clean_removes_what_make_made_and_never_the_runtime_directory(tmp_path: Path) -> None:
    checkout = _scaffold(tmp_path)
    keys = checkout / ".clawdlets/keys/operators/__pycache__/canary.agekey"
    made = [
        checkout / ".cache/log/apt.log",
        checkout / ".venv/bin/python",
        checkout / "clawdlets_ops/__pycache__/a.pyc",
    ]
    for path in (keys, *made):
        path.parent.mkdir(parents=True)
        path.touch()
    done = _run("make", "clean", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert keys.exists()
    assert [path for path in made if path.exists()] == []


def test_make_alone_lists_the_targets(tmp_path: Path) -> None:
    shown = _run("make", cwd=_scaffold(tmp_path))
    assert shown.returncode == 0, shown.stderr
    listed = {line.split()[1] for line in shown.stdout.splitlines()}
    assert {"setup", "demo", "test", "lint", "bench", "clean"} <= listed


def test_prepare_refuses_an_unknown_step_and_names_the_known_ones(tmp_path: Path) -> None:
    refused = _run(str(_scaffold(tmp_path) / "tools/prepare"), "evrything", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stdout == ""
    for step in ("apt", "venv", "tofu", "base", "all", "lock", "clean"):
        assert f"tools/prepare {step}" in refused.stderr
    assert not (tmp_path / ".cache").exists()


def test_scripts_are_executable_and_parse() -> None:
    for name in (".ci/run", "tools/prepare"):
        assert os.access(ROOT / name, os.X_OK)
        assert _run("bash", "-n", name, cwd=ROOT).returncode == 0


def test_the_changelog_is_open_and_the_licence_is_the_declared_one() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()
    assert (ROOT / "LICENSE").read_text().startswith(f"{PYPROJECT['project']['license']} License\n")
