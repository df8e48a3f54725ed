"""Values that are only known to be secret because this project's files, encrypted ones too, hold them."""

import base64
import json
import os
from urllib.parse import quote

import pytest

from clawdlets_ops import age
from clawdlets_ops.guard import report
from clawdlets_ops.guard.run import Request, run
from clawdlets_ops.process import LocalRunner
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.sops import Sops, find_sops
from tests.integration.guard.desk import RUNNER, rules

pytestmark = pytest.mark.integration

VALUE = "canary correct/horse battery"  # no token shape, no entropy: nothing but its value gives it away
KEY = "-----BEGIN CANARY-----\ncanaryline1canaryline1\ncanaryline2canaryline2\n-----END CANARY-----\n"


class Counting(LocalRunner):
    """Counts what it runs."""

    def __init__(self):
        super().__init__(os.environ)
        self.sops = 0

    def run(self, command, **more):
        self.sops += "sops" in str(command.argv[0])
        return super().run(command, **more)


@pytest.fixture
def sealed(git):
    """A repository with an operator's key beside it and three encrypted files in it."""
    identity = age.generate()
    sops = Sops(RUNNER, find_sops(RUNNER))
    git.write(".gitignore", "/.clawdlets/\n")
    git.write(".clawdlets/keys/operators/ann.agekey", age.to_key_file(identity).reveal()).chmod(0o600)
    git.write("secrets/keys/operators/ann.age.pub", identity.recipient + "\n")
    for name, value in (("phrase", VALUE), ("key", KEY), ("short", "abc")):
        text = sops.encrypt({name: Secret(value)}, recipients=[identity.recipient], filename=name)
        git.write(f"secrets/hosts/alpha/{name}.yaml", text)
    git("add", ".")
    git("commit", "-q", "-m", "m")
    return git


def look(git, **more):
    runner = Counting()
    outcome = run(Request(git.folder, "staged", known_secrets=True, **more), runner=runner, environ={})
    return outcome, runner.sops


def test_a_copy_of_an_encrypted_secret_is_found_in_every_form_and_never_shown(sealed):
    raw = VALUE.encode()
    copies = {
        "raw.txt": VALUE,
        "base64.txt": base64.b64encode(raw).decode(),
        "shifted.txt": base64.b64encode(b"x" + raw + b"yz").decode(),
        "url-safe.txt": base64.urlsafe_b64encode(b"xy" + raw).decode(),
        "hex.txt": raw.hex(),
        "quoted.txt": quote(VALUE, safe=""),
        "json.txt": json.dumps({"k": f"é{VALUE}"}),
        "part of a key.txt": "> canaryline2canaryline2",
    }
    for name, content in copies.items():
        sealed.write(name, f"so: {content}\n")
    sealed("add", ".")
    assert sealed.scan("staged").exit_code == 0  # nothing about them looks like a secret
    outcome, calls = look(sealed)
    assert calls == 3  # one for each file
    assert {leak.path for leak in outcome.leaks} == set(copies)
    assert set(rules(outcome)) == {"known-secret"}
    for form in (report.text, report.as_json, report.sarif):
        shown = form(outcome)
        assert "secrets/hosts/alpha/phrase.yaml" in shown
        assert not [content for content in (*copies.values(), VALUE) if content in shown]
    before = {path for path in sealed.folder.rglob("*") if ".git" not in path.parts}
    look(sealed)
    assert {path for path in sealed.folder.rglob("*") if ".git" not in path.parts} == before


def test_what_cannot_be_decrypted_is_unknown_and_not_clean(sealed):
    assert look(sealed)[0].exit_code == 0
    path = sealed.folder / "secrets/hosts/alpha/phrase.yaml"
    good = path.read_text()
    path.write_text(good.replace("data:", "data:AAAA", 1))
    assert look(sealed)[0].exit_code == 2
    path.write_text(good[:-40])
    assert look(sealed)[0].exit_code == 2
    path.write_text(good)
    key = sealed.folder / ".clawdlets/keys/operators/ann.agekey"
    key.chmod(0o644)
    assert look(sealed)[0].exit_code == 2
    key.unlink()
    outcome, calls = look(sealed)
    assert (outcome.exit_code, calls) == (2, 0)
    assert sum("no key is here" in leak.path for leak in outcome.leaks) == 3
    assert sealed.scan("staged").exit_code == 0


def test_values_of_a_state_in_clear_are_known_and_what_is_public_is_not(git):
    instances = [
        {"attributes": {"user_data": "canary-in-user-data", "public_key": "canary-public-key", "name": "canary-a-name"}}
    ]
    git.write(".gitignore", "/.clawdlets/\n")
    git.write(
        ".clawdlets/infra/opentofu/alpha/terraform.tfstate",
        json.dumps({"version": 4, "resources": [{"type": "hcloud_server", "instances": instances}]}),
    )
    git.write(".clawdlets/infra/opentofu/beta/terraform.tfstate", json.dumps({"encrypted_data": "x" * 100}))
    git.write("a.txt", "canary-in-user-data canary-public-key canary-a-name\n")
    git("add", ".")
    outcome = git.scan("staged")
    assert outcome.needles == 1
    assert [(leak.path, leak.rule) for leak in outcome.leaks] == [("a.txt", "known-secret")]
    git.write(".clawdlets/infra/opentofu/beta/terraform.tfstate", "not JSON")
    assert git.scan("staged").leaks[-1].unknown


def test_a_file_that_a_declared_reader_cannot_open_is_a_finding(sealed):
    lena = age.generate().recipient
    sealed.write("secrets/keys/operators/lena.age.pub", lena + "\n")
    sealed("add", ".")
    joining = sealed.scan("staged")
    assert joining.exit_code == 0  # the commit that declares her; others reconcile once it is there
    assert any("3 files under secrets/" in note for note in joining.notes)
    sealed("commit", "-q", "-m", "lena joins")
    outcome = sealed.scan("tracked")
    assert set(rules(outcome)) == {"secrets-missing-recipient"}
    assert len(outcome.leaks) == 3
    assert all(lena in leak.what for leak in outcome.leaks)
    assert "reconcile" in outcome.leaks[0].fix
    path = "secrets/hosts/alpha/phrase.yaml"
    sealed.write(path, (sealed.folder / path).read_text() + "\n")
    sealed("add", path)
    assert rules(sealed.scan("staged")) == ["secrets-missing-recipient"]  # what is written now is for everybody


def test_a_payloads_private_files_are_known_secrets_and_its_public_ones_are_not(git):
    git.write(".gitignore", "/.clawdlets/\n")
    payload = ".clawdlets/extra-files/alpha"
    git.write(
        f"{payload}/var/lib/clawdlets/secrets-wiring.json", '{\n  "discord_token": "canary, as in the fleet file",\n}\n'
    )
    git.write(f"{payload}/var/lib/sops-nix/key.txt", "canary-line-of-a-private-key\n")
    git.write("fleet.json", '  "discord_token": "canary, as in the fleet file",\n')
    git.write("copied.txt", "canary-line-of-a-private-key\n")
    git("add", ".")
    outcome, _ = look(git)
    assert [(leak.rule, leak.path) for leak in outcome.leaks] == [("known-secret", "copied.txt")]
