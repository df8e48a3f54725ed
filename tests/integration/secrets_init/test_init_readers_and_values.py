"""Modes, readers and values after secrets init; and check_host, which judges them."""

import base64
import json
import os
import shutil
import stat

import pytest

from clawdlets_ops import age
from clawdlets_ops.errors import SecretsError, SettingsError, UnreadableError
from clawdlets_ops.secrets.payload import materialise
from clawdlets_ops.secrets.store import (
    check_host,
    host_ssh_pin,
    init_host,
    operator_identity,
    read_values,
)
from clawdlets_ops.secrets.vault import host_recipient_file
from clawdlets_ops.sensitive import Secret
from tests.integration.secrets_init.desk import (
    GIVEN,
    KEY_FILES,
    NEEDED_FILES,
    PASSWORDS,
    VALUES,
    a_project,
    declared_readers,
    hits,
    modes,
    put,
    snapshot,
    value_in,
)

pytestmark = pytest.mark.integration

# --- modes and readers ---


def test_wrong_modes_are_repaired(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    before = modes(project.layout.root)
    layout = project.layout
    for path, mode in (
        (layout.secret_file("alpha", "discord_token"), 0o644),
        (layout.host_age_key_file("alpha"), 0o666),
        (layout.host_ssh_public_key("alpha"), 0o600),
        (layout.sops_config, 0o666),
        (layout.runtime, 0o755),
        (layout.runtime / "keys", 0o777),
        (layout.host_secrets_dir("alpha"), 0o777),
    ):
        path.chmod(mode)
    runner.taken()
    outcome = init_host(project, "alpha", VALUES, runner=runner)
    assert modes(layout.root) == before
    assert runner.taken() == 0
    assert len(outcome.updated) == 4


def test_a_folder_of_the_repository_is_not_opened_wider_than_it_was(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    project.layout.secrets_dir.chmod(0o700)
    init_host(project, "alpha", VALUES, runner=runner)
    assert stat.S_IMODE(project.layout.secrets_dir.stat().st_mode) == 0o700


def test_the_umask_makes_no_difference(tmp_path, runner):
    seen = []
    for umask in (0o077, 0o000, 0o022):
        root = tmp_path / f"{umask:03o}"
        before = os.umask(0o022)
        project = a_project(root)
        try:
            os.umask(umask)
            init_host(project, "alpha", VALUES, runner=runner)
            materialise(project, "alpha", runner=runner)
        finally:
            os.umask(before)
        seen.append(modes(root))
    assert seen[0] == seen[1] == seen[2]


def test_readers_are_declared_not_accumulated(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    second = age.generate()
    public = project.layout.operator_recipients_dir / "second.age.pub"
    public.write_text(second.recipient + "\n")
    runner.taken()
    outcome = init_host(project, "alpha", {}, runner=runner)
    assert len(outcome.updated) == NEEDED_FILES + KEY_FILES + 1
    assert runner.taken() == 2 * (NEEDED_FILES + KEY_FILES)
    assert value_in(project, runner, "discord_token", second) == GIVEN["discord_token"]
    assert second.recipient in project.layout.sops_config.read_text()
    check_host(project, "alpha", runner=runner)

    public.unlink()
    with pytest.raises(SecretsError, match="exactly the declared recipients"):
        check_host(project, "alpha", runner=runner)
    init_host(project, "alpha", {}, runner=runner)
    check_host(project, "alpha", runner=runner)
    with pytest.raises(UnreadableError):
        value_in(project, runner, "discord_token", second)
    assert hits(project.layout.secrets_dir, second.recipient) == set()


def test_two_hosts_share_the_operators_and_nothing_else(tmp_path, runner):
    project = a_project(tmp_path, hosts=("alpha", "beta"))
    init_host(project, "alpha", VALUES, runner=runner)
    init_host(project, "beta", VALUES, runner=runner)
    assert host_ssh_pin(project, "alpha") != host_ssh_pin(project, "beta")
    for host, other in (("alpha", "beta"), ("beta", "alpha")):
        check_host(project, host, runner=runner)
        foreign = host_recipient_file(project.layout, other).read_text().strip()
        assert hits(project.layout.host_secrets_dir(host), foreign) == set()
    before = snapshot(project.layout.root)
    for host in ("alpha", "beta"):
        assert not init_host(project, host, {}, runner=runner).changed
    assert snapshot(project.layout.root) == before
    for host in ("alpha", "beta"):
        materialise(project, host, runner=runner)
        tree = project.layout.extra_files(host)
        assert [path.name for path in (tree / "var/lib/clawdlets/secrets/hosts").iterdir()] == [host]


def test_what_is_no_longer_needed_is_reported_and_left(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    put(project, runner, "old_token", {"old_token": "canary-old"}, to=declared_readers(project))
    outcome = init_host(project, "alpha", {}, runner=runner)
    assert outcome.stale == ("secrets/hosts/alpha/old_token.yaml",)
    assert project.layout.secret_file("alpha", "old_token").exists()
    materialise(project, "alpha", runner=runner)
    assert hits(project.layout.extra_files("alpha"), "old_token") == set()


# --- values and leaks ---


def test_values_come_from_a_private_file_only(tmp_path):
    path = tmp_path / "values.json"
    path.write_text(json.dumps({"alpha": GIVEN}))
    path.chmod(0o600)
    assert read_values(path, "alpha") == VALUES
    path.chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        read_values(path, "alpha")


@pytest.mark.parametrize("name", ["tailscale_auth_key", "discord_token", "model_api_key"])
def test_no_value_lies_anywhere_in_clear(project, runner, name):
    root = project.layout.root
    init_host(project, "alpha", VALUES, runner=runner)
    materialise(project, "alpha", runner=runner)
    check_host(project, "alpha", runner=runner)
    materialise(project, "alpha", runner=runner)
    assert hits(root, GIVEN[name]) == set()
    (root / "plain").write_text(GIVEN[name])
    for offset in range(3):
        (root / f"shifted-{offset}").write_bytes(base64.b64encode(b"x" * offset + GIVEN[name].encode() + b"yz"))
    assert hits(root, GIVEN[name]) == {"plain", "shifted-0", "shifted-1", "shifted-2"}


def test_private_keys_are_where_they_belong_and_nowhere_else(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    materialise(project, "alpha", runner=runner)
    tree = ".clawdlets/extra-files/alpha"
    operator = operator_identity(project).secret.reveal()
    host = (project.layout.root / tree / "var/lib/sops-nix/key.txt").read_text().strip()
    assert hits(project.layout.root, operator) == {".clawdlets/keys/operators/maren.agekey"}
    assert hits(project.layout.root, host) == {f"{tree}/var/lib/sops-nix/key.txt"}
    assert hits(project.layout.root, "OPENSSH PRIVATE KEY") == {f"{tree}/etc/ssh/ssh_host_ed25519_key"}
    assert len(runner.lines) > NEEDED_FILES
    for line in runner.lines:
        assert "canary" not in line
        assert "AGE-SECRET-KEY" not in line
        assert "PRIVATE KEY" not in line


def test_passwords_are_in_no_command_line(project, runner):
    if not shutil.which("mkpasswd"):
        pytest.skip("mkpasswd (Debian package whois) is not there")
    words = {name: Secret(f"canary-{name}-word", name) for name in PASSWORDS}
    rest = {name: value for name, value in VALUES.items() if not name.endswith("_hash")}
    init_host(project, "alpha", words | rest, runner=runner)
    assert any("mkpasswd" in line for line in runner.lines)
    assert not any("canary" in line for line in runner.lines)


# --- check_host ---


def test_check_names_all_faults_at_once(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    readers = declared_readers(project)
    put(project, runner, "discord_token", {"discord_token": "<FILL_ME>"}, to=readers)
    put(project, runner, "admin_password_hash", {"admin_password_hash": "canary-no-hash"}, to=readers)
    put(project, runner, "model_api_key", {"model_api_key": "x"}, to={operator_identity(project).recipient})
    project.layout.secret_file("alpha", "tailscale_auth_key").unlink()
    with pytest.raises(UnreadableError) as caught:  # the host cannot open model_api_key
        check_host(project, "alpha", runner=runner)
    text = str(caught.value)
    assert "discord_token.yaml: is empty or still a placeholder" in text
    assert "admin_password_hash.yaml: is no password hash" in text
    assert "tailscale_auth_key.yaml: is not there" in text
    assert "model_api_key.yaml: is not encrypted to exactly the declared recipients" in text
    assert "model_api_key.yaml: is not encrypted to age1" in text
    assert "breakglass" not in text
    assert "canary" not in text


def test_check_before_init_says_what_to_do(project, runner):
    with pytest.raises(SecretsError, match="secrets init"):
        check_host(project, "alpha", runner=runner)
    with pytest.raises(SecretsError, match="secrets init"):
        host_ssh_pin(project, "alpha")
    with pytest.raises(SecretsError, match="secrets init"):
        materialise(project, "alpha", runner=runner)
