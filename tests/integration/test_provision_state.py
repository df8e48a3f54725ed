"""The state of a host: encrypted by OpenTofu, moved over from clear, kept before each apply, never readable."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawdlets_ops import age, provision
from clawdlets_ops.errors import CommandError, UnreadableError
from clawdlets_ops.provision.state import BACKUPS_KEPT
from clawdlets_ops.secrets import store
from clawdlets_ops.secrets.reconcile import plan_reconcile
from clawdlets_ops.secrets.statekey import state_key, state_key_file
from clawdlets_ops.tofu import is_encrypted
from tests.integration.provisioning import TOKEN, Site, site_in

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_in(tmp_path) as made:
        yield made


def holding(folder: Path, needle: bytes) -> set[str]:
    """Files below ``folder`` that have ``needle`` in them, the provider's own program left out."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_file() and "providers" not in path.parts and needle in path.read_bytes():
            found.add(path.relative_to(folder).as_posix())
    return found


def in_clear(site: Site) -> dict[str, object]:
    """Move the host's state into clear, as an older version left it, with OpenTofu itself."""
    key = state_key(site.project(), runner=site.runner(), may_make=False)
    method = {"aes_gcm": {"old": {"keys": "key_provider.pbkdf2.old"}}, "unencrypted": {"clear": {}}}
    old = {"passphrase": key.reveal(), "iterations": 200_000, "hash_function": "sha256"}
    encryption = {
        "key_provider": {"pbkdf2": {"old": {**old, "encrypted_metadata_alias": "key_provider.pbkdf2.clawdlets"}}},
        "method": method,
        "state": {"method": "method.unencrypted.clear", "fallback": {"method": "method.aes_gcm.old"}},
    }
    env = {**site.environ, "TF_ENCRYPTION": json.dumps(encryption)}
    argv = ["tofu", "apply", "-refresh-only", "-auto-approve", "-no-color"]
    done = subprocess.run(argv, cwd=site.folder(), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    state: dict[str, object] = json.loads((site.folder() / "terraform.tfstate").read_text())
    assert "resources" in state
    return state


def test_no_state_plan_or_backup_is_readable_and_none_holds_a_secret(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[bytes] = []
    apply_saved = provision.applying.apply_saved

    def look(project: object, host: str, *arguments: object, **more: object) -> None:
        plans.append((site.folder(host) / "plan.bin").read_bytes())
        apply_saved(project, host, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(provision.applying, "apply_saved", look)
    site.provision()
    site.declare(labels={"team": "canary-team"})
    site.provision()
    folder = site.folder()
    backups = sorted((folder / "backups").iterdir())
    assert len(plans) == 2
    assert len(backups) == 1
    kept = [*plans, *(path.read_bytes() for path in (folder / "terraform.tfstate", *backups))]
    kept += [path.read_bytes() for path in folder.glob("*.backup")]
    assert all(map(is_encrypted, kept))
    key = state_key(site.project(), runner=site.runner(), may_make=False).reveal()
    for needle in (TOKEN.encode(), key.encode()):
        assert not any(needle in content for content in kept)
        assert holding(site.root / ".clawdlets", needle) == set()
        assert holding(site.root / "secrets", needle) == set()
    # The positive control: the same search finds what is in the configuration, and not in what is encrypted.
    assert holding(folder, b"canary-team") == {"main.tf.json"}
    for path in (folder / "terraform.tfstate", *backups):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not (folder / "plan.bin").exists()


def test_a_state_in_clear_is_moved_over_once_and_refused_afterwards(site: Site) -> None:
    site.provision()
    before = in_clear(site)
    (site.folder() / "terraform.tfstate.backup").write_text(json.dumps(before))
    changed = site.changed()
    site.provision(refresh=True)
    assert any("encrypted the OpenTofu state" in said for said in site.said)
    assert site.changed() == changed
    assert is_encrypted((site.folder() / "terraform.tfstate").read_bytes())
    for path in [
        path for path in site.folder().rglob("*.tfstate*") if path.is_file() and ".terraform" not in path.parts
    ]:
        assert is_encrypted(path.read_bytes()), path
    # From then on OpenTofu itself refuses one in clear.
    (site.folder() / "terraform.tfstate").write_text(json.dumps(before))
    project = site.project()
    tofu = provision.state.open_tofu(project, "alpha", runner=site.runner())
    with pytest.raises(CommandError, match="not encrypted"):
        tofu.plan()


def test_the_backups_are_bounded_and_one_can_be_put_back(site: Site) -> None:
    site.provision()
    for _ in range(BACKUPS_KEPT + 2):
        provision.state.keep(
            site.project(), "alpha", provision.state.open_tofu(site.project(), "alpha", runner=site.runner()),
            runner=site.runner(),
        )  # fmt: skip
    kept = sorted((site.folder() / "backups").iterdir())
    assert len(kept) == BACKUPS_KEPT
    (site.folder() / "terraform.tfstate").unlink()
    shutil.copy(kept[-1], site.folder() / "terraform.tfstate")
    site.provision(refresh=True)
    assert not any("adopt" in said for said in site.said)


def test_a_key_that_is_gone_is_not_replaced_while_a_state_needs_it(site: Site) -> None:
    site.provision()
    state_key_file(site.layout).unlink()
    site.declare(labels={"team": "bots"})
    with pytest.raises(UnreadableError, match="restore it from git"):
        site.provision()
    site.declare("beta")
    with pytest.raises(UnreadableError, match=r"opentofu_state\.yaml"):
        site.provision("beta")
    assert not state_key_file(site.layout).exists()
    # The way on that the message names: without the state, everything is adopted.
    shutil.rmtree(site.folder())
    site.provision()
    assert len(site.rows("servers")) == 1


def test_a_state_of_another_key_says_so(site: Site) -> None:
    site.provision()
    state = (site.folder() / "terraform.tfstate").read_bytes()
    state_key_file(site.layout).unlink()
    shutil.rmtree(site.folder())
    site.provision(refresh=True)
    (site.folder() / "terraform.tfstate").write_bytes(state)
    with pytest.raises(CommandError, match="cannot be decrypted with this project's state key"):
        site.provision(refresh=True)


def test_the_key_goes_to_every_operator_and_stays_the_same(site: Site) -> None:
    site.provision()
    project = site.project()
    key = state_key(project, runner=site.runner(), may_make=False)
    other = age.generate().recipient
    public = site.layout.operator_recipients_dir / "maren.age.pub"
    public.write_text(other + "\n")
    store.change(project, lambda: plan_reconcile(project, runner=site.runner()), runner=site.runner())
    assert other in state_key_file(site.layout).read_text()
    assert state_key(project, runner=site.runner(), may_make=False) == key
