"""The payload's tree: exact paths and modes, nothing of anybody else, nothing secret where it can be read."""

import json
from dataclasses import replace

import pytest

from clawdlets_ops.errors import SecretsError
from clawdlets_ops.fleet import SecretWiring
from clawdlets_ops.secrets.payload import PayloadInputs, contents, plan_payload, wiring
from clawdlets_ops.secrets.plan import Need
from clawdlets_ops.sensitive import Secret

NEEDED = (
    Need("admin_password_hash", "why", "password-hash", SecretWiring()),
    Need("token", "why", "value", SecretWiring(owner="bot-a", group="bots", mode="0440")),
)
INPUTS = PayloadInputs(
    age_secret=Secret("AGE-SECRET-KEY-canary"),
    ssh_private=Secret("ssh-canary\n"),
    ssh_public="ssh-ed25519 AAAA",
    encrypted={"admin_password_hash": "sealed one\n", "token": "sealed two\n"},
)


def test_the_tree_is_exactly_this():
    assert {entry.path: f"{entry.mode:04o}" for entry in plan_payload("alpha", NEEDED, INPUTS).entries} == {
        ".": "0755",
        "etc": "0755",
        "etc/ssh": "0755",
        "etc/ssh/ssh_host_ed25519_key": "0600",
        "etc/ssh/ssh_host_ed25519_key.pub": "0644",
        "var": "0755",
        "var/lib": "0755",
        "var/lib/clawdlets": "0755",
        "var/lib/clawdlets/install.json": "0644",
        "var/lib/clawdlets/secrets": "0700",
        "var/lib/clawdlets/secrets-wiring.json": "0644",
        "var/lib/clawdlets/secrets/hosts": "0700",
        "var/lib/clawdlets/secrets/hosts/alpha": "0700",
        "var/lib/clawdlets/secrets/hosts/alpha/admin_password_hash.yaml": "0400",
        "var/lib/clawdlets/secrets/hosts/alpha/token.yaml": "0400",
        "var/lib/sops-nix": "0700",
        "var/lib/sops-nix/key.txt": "0400",
    }


def test_folders_come_before_what_is_in_them():
    paths = [entry.path for entry in plan_payload("alpha", NEEDED, INPUTS).entries]
    for path in paths[1:]:
        parent = path.rpartition("/")[0] or "."
        assert paths.index(parent) < paths.index(path)


def test_keys_are_delivered_as_the_programs_want_them():
    files = contents("alpha", NEEDED, INPUTS)
    assert files["var/lib/sops-nix/key.txt"] == b"AGE-SECRET-KEY-canary\n"
    assert files["etc/ssh/ssh_host_ed25519_key"] == b"ssh-canary\n"
    assert files["etc/ssh/ssh_host_ed25519_key.pub"] == b"ssh-ed25519 AAAA alpha\n"
    assert files["var/lib/clawdlets/secrets/hosts/alpha/token.yaml"] == b"sealed two\n"


def test_what_everybody_may_read_holds_no_secret():
    files = contents("alpha", NEEDED, INPUTS)
    readable = {
        entry.path for entry in plan_payload("alpha", NEEDED, INPUTS).entries if entry.sha256 and entry.mode & 0o004
    }
    assert readable == {
        "etc/ssh/ssh_host_ed25519_key.pub",
        "var/lib/clawdlets/install.json",
        "var/lib/clawdlets/secrets-wiring.json",
    }
    in_clear = [path for path, data in files.items() if b"canary" in data]
    assert sorted(in_clear) == ["etc/ssh/ssh_host_ed25519_key", "var/lib/sops-nix/key.txt"]


@pytest.mark.parametrize(
    "other",
    [
        replace(INPUTS, age_secret=Secret("AGE-SECRET-KEY-canary2")),
        replace(INPUTS, ssh_private=Secret("ssh-canary2\n")),
        replace(INPUTS, encrypted={**INPUTS.encrypted, "token": "sealed three\n"}),
    ],
)
def test_every_input_is_in_the_digest(other):
    one = plan_payload("alpha", NEEDED, INPUTS)
    assert plan_payload("alpha", NEEDED, INPUTS).digest == one.digest
    assert plan_payload("alpha", NEEDED, other).digest != one.digest


def test_the_host_is_in_the_digest():
    assert plan_payload("alpha", NEEDED, INPUTS).digest != plan_payload("beta", NEEDED, INPUTS).digest


def test_secrets_of_others_are_left_out():
    more = replace(INPUTS, encrypted={**INPUTS.encrypted, "stale": "sealed\n"})
    assert plan_payload("alpha", NEEDED, more) == plan_payload("alpha", NEEDED, INPUTS)


def test_a_missing_secret_is_named():
    with pytest.raises(SecretsError, match="lacks token"):
        plan_payload("alpha", NEEDED, replace(INPUTS, encrypted={"admin_password_hash": "x"}))


def test_the_wiring_says_who_reads_what_on_the_host():
    assert json.loads(wiring("alpha", NEEDED)) == {
        "host": "alpha",
        "secrets": [
            {
                "name": "admin_password_hash",
                "sopsFile": "/var/lib/clawdlets/secrets/hosts/alpha/admin_password_hash.yaml",
                "owner": "root",
                "group": None,
                "mode": "0400",
                "neededForUsers": True,
            },
            {
                "name": "token",
                "sopsFile": "/var/lib/clawdlets/secrets/hosts/alpha/token.yaml",
                "owner": "bot-a",
                "group": "bots",
                "mode": "0440",
                "neededForUsers": False,
            },
        ],
    }
