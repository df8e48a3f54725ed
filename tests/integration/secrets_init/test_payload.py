"""The install payload on a real disk: laid once, compared, laid anew when it was touched."""

import json
import shutil

import pytest

from clawdlets_ops import age, hostkey
from clawdlets_ops.errors import SecretsError
from clawdlets_ops.secrets.payload import materialise, observe, payload_is_current
from clawdlets_ops.secrets.store import (
    host_ssh_pin,
    init_host,
    operator_identity,
)
from clawdlets_ops.sensitive import Secret
from tests.integration.secrets_init.desk import GIVEN, KEY_FILES, VALUES, put, snapshot, sops_for

pytestmark = pytest.mark.integration

# --- the payload ---


@pytest.fixture
def laid(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    outcome = materialise(project, "alpha", runner=runner)
    assert outcome.changed
    runner.taken()
    return outcome


def test_the_payload_on_disk_is_the_planned_one(project, runner, laid):
    tree = project.layout.extra_files("alpha")
    assert observe(tree) == laid.manifest
    marker = json.loads((tree / "var/lib/clawdlets/install.json").read_text())
    assert marker == {"host": "alpha", "payloadDigest": laid.digest}
    key = (tree / "var/lib/sops-nix/key.txt").read_text()
    assert age.from_secret(Secret(key)).secret.reveal() + "\n" == key
    private = Secret((tree / "etc/ssh/ssh_host_ed25519_key").read_text())
    assert hostkey.public_of(private) == host_ssh_pin(project, "alpha")
    for name in GIVEN:
        shipped = tree / f"var/lib/clawdlets/secrets/hosts/alpha/{name}.yaml"
        assert shipped.read_bytes() == project.layout.secret_file("alpha", name).read_bytes()
        assert sops_for(runner).decrypt(shipped, identity=Secret(key.strip()))[name].reveal() == GIVEN[name]


def test_an_unchanged_payload_is_not_touched(project, runner, laid):
    before = snapshot(project.layout.runtime)
    assert payload_is_current(project, "alpha")
    again = materialise(project, "alpha", runner=runner)
    assert snapshot(project.layout.runtime) == before
    assert runner.taken() == 0
    assert (again.changed, again.digest, again.manifest) == (False, laid.digest, laid.manifest)


def mode_changed(project, tree):
    (tree / "var/lib").chmod(0o700)


def content_changed(project, tree):
    path = tree / "etc/ssh/ssh_host_ed25519_key.pub"
    path.write_text("ssh-ed25519 canary\n")


def file_added(project, tree):
    (tree / "etc/passwd").touch()


def link_added(project, tree):
    (tree / "etc/link").symlink_to("/etc/passwd")


def file_gone(project, tree):
    (tree / "var/lib/sops-nix/key.txt").unlink()


def tree_gone(project, tree):
    shutil.rmtree(tree)


@pytest.mark.parametrize(
    "damage",
    [mode_changed, content_changed, file_added, link_added, file_gone, tree_gone],
    ids=lambda damage: damage.__name__,
)
def test_a_payload_that_was_changed_is_laid_anew(project, runner, laid, damage):
    damage(project, project.layout.extra_files("alpha"))
    assert not payload_is_current(project, "alpha")
    again = materialise(project, "alpha", runner=runner)
    assert again.changed
    assert again.manifest == observe(project.layout.extra_files("alpha")) == laid.manifest
    assert payload_is_current(project, "alpha")


def test_a_changed_secret_makes_another_payload(project, runner, laid):
    init_host(project, "alpha", {"discord_token": Secret("canary-new")}, runner=runner)
    assert not payload_is_current(project, "alpha")
    again = materialise(project, "alpha", runner=runner)
    assert again.changed
    assert again.digest != laid.digest


def test_without_its_record_the_tree_is_compared_and_kept(project, runner, laid):
    tree = project.layout.extra_files("alpha")
    before = snapshot(tree)
    (project.layout.runtime / "state" / "payload-alpha.json").unlink()
    assert not payload_is_current(project, "alpha")
    assert not materialise(project, "alpha", runner=runner).changed
    assert runner.taken() == KEY_FILES
    assert snapshot(tree) == before


def test_what_an_interrupted_build_left_is_swept(project, runner, laid):
    tree = project.layout.extra_files("alpha")
    for name in (".alpha.0a0a0a0a0a0a.tmp", ".alpha.0a0a0a0a0a0a.old"):
        shutil.copytree(tree, tree.with_name(name))
    shutil.rmtree(tree)
    assert materialise(project, "alpha", runner=runner).manifest == laid.manifest
    assert [path.name for path in tree.parent.iterdir()] == ["alpha"]


def test_a_payload_is_not_made_of_a_secret_that_the_host_cannot_open(project, runner):
    init_host(project, "alpha", VALUES, runner=runner)
    only_us = {operator_identity(project).recipient}
    put(project, runner, "discord_token", {"discord_token": "canary-x"}, to=only_us)
    with pytest.raises(SecretsError, match="discord_token is not encrypted to alpha"):
        materialise(project, "alpha", runner=runner)
    assert not project.layout.extra_files("alpha").exists()
