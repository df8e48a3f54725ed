"""A new project as a plan: what is in it, and what may be said of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from clawdlets_ops import scaffold
from clawdlets_ops.declare import Wish
from clawdlets_ops.doctor.of_clone import references
from clawdlets_ops.doctor.supply import dependabot_gaps, merging, unpinned
from clawdlets_ops.errors import FleetError, SettingsError
from clawdlets_ops.fleet import json_schema, parse_fleet
from clawdlets_ops.scaffold.source import UNLOCATED, installed_from, source
from tests.installed import commands_in

ROOT = Path(__file__).parents[2]
HUB = source("github:example/clawdlets-ops/v1")
WISH = Wish(admin_cidrs=("203.0.113.0/24", "2001:db8:7::/48"), ssh_pubkey_file="~/.ssh/id_ed25519.pub")


def plan(wish: Wish = WISH, *, rehearsal: bool = False, origin: str = HUB.flake, host: str = "alpha") -> dict[str, str]:
    return dict(scaffold.plan("p", host, wish, origin=source(origin), rehearsal=rehearsal).files)


def test_deploys_and_inventories_are_this_repositorys_own() -> None:
    files = plan()
    own = sorted(
        f"{folder}/{path.name}" for folder in ("deploys", "inventory") for path in (ROOT / folder).glob("*.py")
    )
    assert [name for name in files if name.startswith(("deploys/", "inventory/"))] == own
    for name in own:
        assert files[name] == (ROOT / name).read_text()


@pytest.mark.parametrize("rehearsal", [True, False])
def test_the_fleet_file_is_acceptable_annotated_and_completed_by_an_editor(*, rehearsal: bool) -> None:
    files = plan(Wish(secrets=("token=bot-maren",)) if rehearsal else WISH, rehearsal=rehearsal)
    document = json.loads(files["fleet/clawdlets.json"])
    host = parse_fleet(files["fleet/clawdlets.json"]).host("alpha")
    assert (host.ssh_exposure.mode, host.tailnet.mode, host.egress.mode) == ("tailnet", "tailscale", "smtp-only")
    assert document["$schema"] == "./clawdlets.schema.json"
    assert json.loads(files["fleet/clawdlets.schema.json"]) == json_schema()
    assert files["fleet/clawdlets.json"].count("$comment") >= 6
    assert list(host.secrets) == (["token"] if rehearsal else [])
    example = json.loads((ROOT / "fleet" / "clawdlets.json").read_text())["hosts"]["alpha"]["provisioning"]
    expected = tuple(example["adminCidrs"]) if rehearsal else WISH.admin_cidrs
    assert host.provisioning.admin_cidrs == expected
    assert host.provisioning.ssh_pubkey_file == (example["sshPubkeyFile"] if rehearsal else WISH.ssh_pubkey_file)


def test_supply_chain_of_a_new_project_is_as_the_doctor_asks() -> None:
    files = plan()
    workflow = yaml.safe_load(files[".github/workflows/fleet.yml"])
    assert unpinned(workflow) == []
    assert merging(workflow) == []
    assert dependabot_gaps(yaml.safe_load(files[".github/dependabot.yml"]), workflows=True) == []
    pins = set(re.findall(r"uses: (\S+ # \S+)", files[".github/workflows/fleet.yml"]))
    assert (
        pins - set(re.findall(r"uses: (\S+ # \S+)", (ROOT / ".github" / "workflows" / "ci.yml").read_text())) == set()
    )
    assert "permissions:\n  contents: read\n" in files[".github/workflows/fleet.yml"]


def test_nothing_is_referred_to_by_path_and_the_source_is_where_it_is_needed() -> None:
    files = plan()
    assert [(name, found) for name, text in files.items() for found in references(text.encode())] == []
    assert f'clawdlets.url = "{HUB.flake}";' in files["flake.nix"]
    assert files["requirements.txt"].endswith("\nclawdlets-ops @ git+https://github.com/example/clawdlets-ops@v1\n")
    assert "Before that" not in files["README.md"]
    unlocated = plan(origin=UNLOCATED)
    assert f"in the place of `{UNLOCATED}`" in unlocated["README.md"]


def test_the_flake_calls_what_this_repositorys_flake_offers() -> None:
    [line] = [line for line in plan()["flake.nix"].splitlines() if "nixosConfigurations" in line]
    assert line in (ROOT / "nix" / "template" / "flake.nix").read_text().splitlines()


@pytest.mark.parametrize("rehearsal", [True, False])
def test_nix_takes_the_new_projects_flake_and_fleet_as_python_does(tmp_path: Path, *, rehearsal: bool) -> None:
    if (program := shutil.which("nix-instantiate")) is None:
        pytest.skip("nix-instantiate is not on PATH")
    for name, text in plan(rehearsal=rehearsal).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    question = f"builtins.attrNames ((import {ROOT}/nix/fleet.nix).load {tmp_path}/fleet/clawdlets.json).hosts"
    asked = subprocess.run([program, "--eval", "--strict", "-E", question], capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert asked.stdout.strip() == '[ "alpha" ]', asked.stderr
    parsed = subprocess.run([program, "--parse", tmp_path / "flake.nix"], capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert parsed.returncode == 0, parsed.stderr


@pytest.mark.parametrize("rehearsal", [True, False])
def test_the_readme_has_five_commands_and_no_mark_of_a_template(*, rehearsal: bool) -> None:
    for name, text in plan(rehearsal=rehearsal).items():
        assert not re.search(r"<<[a-z]|>>|<%|%>", text), name
        assert text.endswith("\n")
        assert "\n\n\n" not in text, name
    assert len(commands_in(plan(rehearsal=rehearsal)["README.md"])) == 5


@pytest.mark.parametrize(
    ("wish", "host", "said"),
    [
        (Wish(), "alpha", "no admin key"),
        (WISH, "Alpha", "hosts.Alpha"),
        (WISH, "a" * 64, "hosts."),
        (WISH, "../x", "hosts.../x"),
        (Wish(admin_cidrs=("0.0.0.0/1",), ssh_pubkey_file="x.pub"), "alpha", "internet at large"),
        (Wish(admin_cidrs=("10.0.0.1/8",), ssh_pubkey_file="x.pub"), "alpha", "host bits"),
        (Wish(admin_cidrs=WISH.admin_cidrs, ssh_pubkey_file="x.pub", tailnet="none"), "alpha", "nobody can reach"),
    ],
)
def test_what_makes_no_host_is_refused_with_its_key_path(wish: Wish, host: str, said: str) -> None:
    with pytest.raises(FleetError) as caught:
        plan(wish, host=host)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "requirement"),
    [
        ("github:example/clawdlets-ops", "git+https://github.com/example/clawdlets-ops"),
        ("github:example/clawdlets-ops/v1.2", "git+https://github.com/example/clawdlets-ops@v1.2"),
        ("git+https://git.example.org/a/b.git?rev=0a1b", "git+https://git.example.org/a/b.git@0a1b"),
        ("git+ssh://git@git.example.org/a/b?ref=main", "git+ssh://git@git.example.org/a/b@main"),
    ],
)
def test_a_source_is_one_for_nix_and_for_pip(reference: str, requirement: str) -> None:
    found = source(reference)
    assert (found.flake, found.requirement, found.located) == (reference, f"clawdlets-ops @ {requirement}", True)


@pytest.mark.parametrize(
    "reference",
    [
        "path:/srv/x", "path:./x", "./x", "../x", "/srv/x", "~/x", "git+file:///srv/x", "file:x",
        "git+https://olive" + ":canary@example.org/x", "git+http://example.org/x", "github:a", "github:a/b/c d",
        'github:a/b";x="', "", "git+https://example.org/x?dir=y", "git+https://-x/y z",
    ],
)  # fmt: skip
def test_a_source_that_is_a_folder_or_holds_a_password_is_refused(reference: str) -> None:
    with pytest.raises(SettingsError) as caught:
        source(reference)
    assert "canary" not in str(caught.value)


def test_where_an_installation_is_from_is_what_pip_wrote_down() -> None:
    git = {"url": "https://example.org/a/b.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b2c"}}
    assert installed_from(json.dumps(git)) == "git+https://example.org/a/b.git?rev=0a1b2c"
    for noted in (
        None,
        "",
        "[]",
        '{"url": "file:///x", "dir_info": {}}',
        json.dumps({**git, "url": "https://u:p@x/y"}),
    ):
        assert installed_from(noted) == UNLOCATED
    assert not source(UNLOCATED).located


@pytest.mark.parametrize("name", ["fleet", 'a"b', "a${throw 1}b", "a$${1}b", r"a\\", "a\\", r"\${x}"])
def test_the_name_of_a_folder_is_text_in_the_flake(name: str) -> None:
    flake = scaffold.plan(name, "alpha", WISH, origin=HUB).files["flake.nix"]
    found = re.search(r'description = "((?:[^"\\]|\\.)*)";\n', flake)
    assert found is not None
    unescaped = re.sub(r"\\.", "-", found[1])
    assert "${" not in unescaped
    assert re.sub(r"\\(.)", r"\1", found[1]) == f"The fleet {name}"
