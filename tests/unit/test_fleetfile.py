"""The fleet file as a document: what is refused before it is understood, edits that change nothing else, migrations."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from clawdlets_ops import declare, fleetfile
from clawdlets_ops.cli import clawdlets
from clawdlets_ops.declare import Wish
from clawdlets_ops.errors import FleetError
from clawdlets_ops.fleet import json_schema, load_fleet, parse_fleet
from tests.unit.test_fleet import KEY, fleet, refused

EXAMPLE = Path(__file__).parents[2] / "fleet" / "clawdlets.json"
REACHED = Wish(admin_cidrs=("203.0.113.0/24",), ssh_pubkey_file="~/.ssh/id_ed25519.pub")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleet" / "clawdlets.json").write_text(EXAMPLE.read_text())
    return tmp_path


def run(project: Path, *words: str, ok: bool = True) -> str:
    done = CliRunner().invoke(clawdlets, ["--project", str(project), *words], catch_exceptions=True)
    if ok:
        assert done.exit_code == 0, done.output
        return done.output
    assert isinstance(done.exception, FleetError), done.output
    return str(done.exception)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8 (byte 0)"),
        (b" " * (fleetfile.MAX_BYTES + 1), "is larger than"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "nested too deeply"),
        (b'{"schemaVersion": NaN}', "NaN is no value of JSON"),
        (b'{"schemaVersion": 1e999, "hosts": {}}', "schemaVersion: must be the number 1"),
        (b'{"schemaVersion": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"schemaVersion": true, "hosts": {}}', "schemaVersion: must be the number 1"),
        (b'{"schemaVersion": 1, "hosts": {"a\\u001b[31m": {}}}', "hosts.a\\x1b[31m"),
        (b'{"schemaVersion": 1, "a": 1, "a": 2}', "the key 'a' appears twice"),
        (b"null", "(top)"),
        (b"", "is not valid JSON"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "clawdlets.json"
    path.write_bytes(content)
    with pytest.raises(FleetError) as caught:
        load_fleet(path)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(FleetError, match=r"is not a regular file|Is a directory"):
            load_fleet(path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FleetError, match="cannot be read"):
        load_fleet(tmp_path / "loop")


def test_line_ends_of_windows_are_as_good(tmp_path: Path) -> None:
    path = tmp_path / "clawdlets.json"
    path.write_bytes(EXAMPLE.read_bytes().replace(b"\n", b"\r\n"))
    assert load_fleet(path) == load_fleet(EXAMPLE)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (2, "newer than 1, the newest that is known here: update clawdlets-ops"),
        (12, "clawdlets fleet import FILE"),
        (0, "no such version was ever written"),
        ("1", "must be the number 1"),
        (None, "must be the number 1"),
    ],
)
def test_another_version_is_refused_with_what_to_do(version: object, said: str) -> None:
    text = json.dumps({"schemaVersion": version, "hosts": json.loads(fleet())["hosts"]})
    assert f"schemaVersion: {said}" in refused(text) or said in refused(text)
    with pytest.raises(FleetError) as caught:
        fleetfile.migrate({"schemaVersion": version}, where="x")
    assert said in str(caught.value)
    assert "nothing was changed" in str(caught.value)


class TestMigrations:
    """With steps of their own: one version is all there is today."""

    @staticmethod
    def step(document: dict[str, Any]) -> dict[str, Any]:
        return {**document, "schemaVersion": document["schemaVersion"] + 1, "went": [*document.get("went", []), document["schemaVersion"]]}  # fmt: skip

    def test_each_step_is_taken_once_and_in_order(self) -> None:
        before = {"schemaVersion": 1, "hosts": {}}
        migrated = fleetfile.migrate(before, where="x", newest=3, steps={1: self.step, 2: self.step})
        assert migrated.versions == (1, 2, 3)
        assert migrated.document == {"schemaVersion": 3, "hosts": {}, "went": [1, 2]}
        assert before == {"schemaVersion": 1, "hosts": {}}

    def test_the_newest_needs_no_step(self) -> None:
        assert fleetfile.migrate({"schemaVersion": 1}, where="x").versions == (1,)

    def test_a_step_that_leads_elsewhere_and_a_gap_are_refused(self) -> None:
        with pytest.raises(FleetError, match="did not lead to 2"):
            fleetfile.migrate({"schemaVersion": 1}, where="x", newest=2, steps={1: dict})
        with pytest.raises(FleetError, match="nothing was changed"):
            fleetfile.migrate({"schemaVersion": 1}, where="x", newest=3, steps={2: self.step})


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_host_is_added_and_every_other_byte_stays(line_end: str) -> None:
    text = EXAMPLE.read_text().replace("\n", line_end)
    changed = declare.add_host(text, "bravo", REACHED, where="x")
    at = next(index for index, (old, new) in enumerate(zip(text, changed, strict=False)) if old != new)
    rest = text[at:]
    assert changed.startswith(text[:at])
    assert changed.endswith(rest)
    assert ("\r\n" in changed) is (line_end == "\r\n")
    assert "\n" not in changed.replace(line_end, "")
    assert list(parse_fleet(changed).hosts) == ["alpha", "bravo"]
    assert (
        f'    "bravo": {{{line_end}      "provisioning": {{{line_end}        "adminCidrs": ["203.0.113.0/24"],'
        in changed
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"schemaVersion": 1, "hosts": {"a": HOST}}',
        '{\n\t"hosts": {\n\t\t"a": HOST\n\t},\n\t"schemaVersion": 1\n}\n',
        '\n{ "$comment": "}, \\" {", "hosts" : {"a":HOST\n} , "schemaVersion":1}',
    ],
)
def test_any_way_to_write_it_is_edited(text: str) -> None:
    host = json.dumps(json.loads(fleet())["hosts"]["alpha"])
    before = text.replace("HOST", host)
    after = declare.add_host(before, "b", REACHED, where="x")
    expected = json.loads(before)
    expected["hosts"]["b"] = {
        "provisioning": {"adminCidrs": ["203.0.113.0/24"], "sshPubkeyFile": "~/.ssh/id_ed25519.pub"}
    }
    assert json.loads(after) == expected
    assert list(json.loads(after)) == list(json.loads(before))
    if "\n\t" in text:
        assert '\n\t\t"b": {\n' in after


def test_an_empty_object_takes_a_first_member() -> None:
    assert fleetfile.add_member('{\n  "hosts": {}\n}\n', ["hosts"], "a", {"x": 1}) == (
        '{\n  "hosts": {\n    "a": {\n      "x": 1\n    }\n  }\n}\n'
    )
    with pytest.raises(KeyError):
        fleetfile.add_member('{"hosts": 1}', ["hosts"], "a", {})


@pytest.mark.parametrize(
    ("name", "wish", "like", "said"),
    [
        ("alpha", REACHED, "", "there is already a host 'alpha'"),
        ("Bravo", REACHED, "", "hosts.Bravo"),
        ("bravo", Wish(), "", "no admin key"),
        ("bravo", Wish(ssh_pubkey_file="x.pub"), "", "adminCidrs is empty"),
        ("bravo", Wish(admin_cidrs=("0.0.0.0/1",), ssh_pubkey_file="x.pub"), "", "internet at large"),
        ("bravo", Wish(tailnet="none"), "alpha", "nobody can reach"),
        ("bravo", Wish(secrets=("tailscale_auth_key",)), "alpha", "not to be wired here"),
        ("bravo", Wish(), "alhpa", "did you mean 'alpha'?"),
    ],
)
def test_a_host_that_is_not_acceptable_is_not_added(name: str, wish: Wish, like: str, said: str) -> None:
    with pytest.raises(FleetError) as caught:
        declare.add_host(EXAMPLE.read_text(), name, wish, like=like, where="x")
    assert said in str(caught.value)


def test_likeness_takes_all_but_where_a_host_is_reached() -> None:
    text = EXAMPLE.read_text().replace('"diskDevice": "/dev/sda",', '"targetHost": "admin@100.64.0.7",')
    added = parse_fleet(declare.add_host(text, "bravo", Wish(server_type="cax11"), like="alpha", where="x")).host(
        "bravo"
    )
    like = parse_fleet(text).host("alpha")
    assert like.target_host == "admin@100.64.0.7"
    assert added.target_host is None
    assert added.provisioning == like.provisioning
    assert added.secrets == like.secrets
    assert (added.system, added.hetzner.server_type, added.hetzner.server_type_fallbacks) == (
        "aarch64-linux",
        "cax11",
        (),
    )


def test_the_commands_on_a_project(project: Path) -> None:
    file = project / "fleet" / "clawdlets.json"
    assert "acceptable; 1 hosts: alpha" in run(project, "fleet", "validate")
    file.chmod(0o640)
    run(project, "host", "add", "bravo", "--like", "alpha", "--secret", "token=bot-x", "--exposure", "public")
    assert file.stat().st_mode & 0o777 == 0o640
    rows = json.loads(run(project, "host", "list", "--json"))
    assert [(row["host"], row["sshExposure"], row["secrets"]) for row in rows] == [("alpha", "tailnet", 2), ("bravo", "public", 1)]  # fmt: skip
    assert run(project, "host", "list").splitlines()[2].startswith("bravo  cx23")
    assert json.loads(run(project, "fleet", "show", "--host", "bravo"))["egress"]["mode"] == "smtp-only"
    assert "nothing to do" in run(project, "fleet", "migrate")
    before = file.read_bytes()
    run(project, "host", "add", "carol", ok=False)
    assert file.read_bytes() == before
    assert json.loads(run(project, "schema")) == json.loads(run(project, "fleet", "schema")) == json_schema()
    (project / "fleet" / "clawdlets.schema.json").write_text("{}")
    assert "fleet schema --write" in run(project, "fleet", "validate")
    run(project, "schema", "--write")
    assert "fleet schema --write" not in run(project, "fleet", "validate")


def test_the_line_of_a_key_file_is_declared_with_its_name(project: Path) -> None:
    (project / "ops.pub").write_text(f"{KEY}\n")
    run(project, "host", "add", "bravo", "--ssh-pubkey-file", "ops.pub", "--admin-cidr", "203.0.113.0/24")
    assert load_fleet(project / "fleet" / "clawdlets.json").host("bravo").ssh_authorized_keys == (KEY,)
    (project / "ops.pub").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    done = CliRunner().invoke(
        clawdlets, ["--project", str(project), "host", "add", "c", "--ssh-pubkey-file", "ops.pub"]
    )
    assert "this is a private key" in str(done.exception)


def test_an_edit_goes_where_a_link_leads(project: Path, tmp_path: Path) -> None:
    file = project / "fleet" / "clawdlets.json"
    real = tmp_path / "elsewhere.json"
    file.rename(real)
    file.symlink_to(real)
    run(project, "host", "add", "bravo", "--like", "alpha")
    assert file.is_symlink()
    assert list(load_fleet(real).hosts) == ["alpha", "bravo"]


def names_of(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Every map in the schema whose keys are names."""
    found = [schema] if "patternProperties" in schema else []
    for value in schema.values():
        if isinstance(value, dict):
            found += names_of(value)
    return found


def test_an_editor_takes_a_comment_anywhere_and_no_name_of_another_form() -> None:
    maps = names_of(json_schema())
    assert len(maps) >= 5
    for part in maps:
        assert part["additionalProperties"] is False
        assert part["properties"] == {"$comment": {"type": "string"}}
