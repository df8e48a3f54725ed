"""What a host needs, what may be given for it, and who reads what."""

import re

import pytest
import yaml

from clawdlets_ops.errors import SecretsError
from clawdlets_ops.fleet import Host, parse_fleet
from clawdlets_ops.secrets.plan import (
    input_names,
    is_placeholder,
    needs,
    parse_values,
    sops_config,
    value_faults,
)
from clawdlets_ops.sensitive import Secret

CANARY = "canary-value-in-plan"


def a_host(tailnet="tailscale", secrets="{}") -> Host:
    exposure = "tailnet" if tailnet == "tailscale" else "public"
    text = f"""{{"schemaVersion": 1, "hosts": {{"alpha": {{
      "provisioning": {{"adminCidrs": ["192.0.2.0/24"], "sshPubkeyFile": "k.pub"}},
      "sshExposure": {{"mode": "{exposure}"}}, "tailnet": {{"mode": "{tailnet}"}}, "secrets": {secrets}}}}}}}"""
    return parse_fleet(text).host("alpha")


def test_every_host_needs_two_password_hashes_of_root():
    needed = needs("alpha", a_host(tailnet="none"))
    assert [(need.name, need.kind) for need in needed] == [
        ("admin_password_hash", "password-hash"),
        ("breakglass_password_hash", "password-hash"),
    ]
    assert {(need.wiring.owner, need.wiring.mode) for need in needed} == {("root", "0400")}


def test_tailnet_and_wired_secrets_are_needed_too():
    needed = needs("alpha", a_host(secrets='{"zeta": {"owner": "bot-b"}, "beta": {"owner": "bot-a", "mode": "0440"}}'))
    assert [need.name for need in needed[2:]] == ["tailscale_auth_key", "beta", "zeta"]
    assert [(need.wiring.owner, need.wiring.mode) for need in needed[3:]] == [("bot-a", "0440"), ("bot-b", "0400")]


@pytest.mark.parametrize(
    "text", ["", "  \n", "<FILL_ME>", " <your token here> ", "CHANGEME", "changeme123", "CHANGE_ME", "Fill-me", "TODO"]
)
def test_placeholders_are_seen(text):
    assert is_placeholder(text)


@pytest.mark.parametrize("text", ["replacement-4711", "a<b>c", "hunter2", "$y$j9T$a$b", "xoxb-1", "todos-are-fun", "x"])
def test_values_are_no_placeholders(text):
    assert not is_placeholder(text)


def test_a_password_may_stand_in_for_its_hash_and_nothing_else():
    names = input_names(needs("alpha", a_host()))
    assert set(names) == {
        *("admin_password", "admin_password_hash", "breakglass_password", "breakglass_password_hash"),
        "tailscale_auth_key",
    }
    assert names["admin_password"] == names["admin_password_hash"]


def test_every_faulty_key_is_named_at_once_and_no_value():
    values = {
        "tailscale_auth_kye": Secret(CANARY),
        "admin_password": Secret(CANARY),
        "admin_password_hash": Secret(CANARY),
        "breakglass_password": Secret("<canary>"),
    }
    faults = value_faults(needs("alpha", a_host()), values)
    assert len(faults) == 3
    assert "did you mean 'tailscale_auth_key'" in faults[0]
    assert faults[1].startswith("admin_password: admin_password_hash is given too")
    assert faults[2].startswith("breakglass_password: is empty or still a placeholder")
    assert "canary" not in "".join(faults)


@pytest.mark.parametrize("value", ["canary\0", "canary\ud800"])
def test_what_cannot_be_written_as_text_is_refused(value):
    (fault,) = value_faults(needs("alpha", a_host()), {"tailscale_auth_key": Secret(value)})
    assert fault.startswith("tailscale_auth_key: holds a NUL or half a surrogate")


def test_good_values_have_no_faults():
    assert value_faults(needs("alpha", a_host()), {"admin_password": Secret(CANARY)}) == []


def test_values_are_read_for_one_host_or_for_each():
    flat = f'{{"a": "{CANARY}"}}'
    nested = f'{{"alpha": {{"a": "{CANARY}"}}, "beta": {{"b": "x"}}}}'
    for text in (flat, nested):
        assert parse_values(text, "alpha", where="values.json") == {"a": Secret(CANARY)}
    assert parse_values(nested, "gamma", where="values.json", declared=("alpha", "beta", "gamma")) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'{{"a": "{CANARY}", "a": "y"}}', "'a' appears twice"),
        (f'{{"alhpa": {{"a": "{CANARY}"}}}}', "did you mean 'alpha'"),
        (f'{{"a": ["{CANARY}"], "b": "x"}}', "not: a"),
        (f'{{"a": "{CANARY}"', "not valid JSON"),
        (f'["{CANARY}"]', "not a JSON object"),
    ],
)
def test_wrong_values_are_refused_without_showing_them(text, says):
    with pytest.raises(SecretsError) as caught:
        parse_values(text, "alpha", where="values.json", declared=("alpha",))
    assert says in str(caught.value)
    assert "values.json" in str(caught.value)
    assert CANARY not in str(caught.value)
    # what the traceback would print beside it
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_sops_rules_are_anchored_and_one_file_has_one_rule():
    rules = yaml.safe_load(sops_config({"beta": "age1b", "alpha": "age1a"}, {"age1op"}))["creation_rules"]

    def readers(path):
        matching = [rule for rule in rules if re.search(rule["path_regex"], path)]
        assert len(matching) <= 1
        return [reader for rule in matching for group in rule["key_groups"] for reader in group["age"]]

    assert readers("keys/hosts/alpha.agekey.yaml") == ["age1op"]
    assert readers("keys/hosts/alpha.ssh_host_ed25519_key.yaml") == ["age1op"]
    assert readers("hosts/alpha/discord_token.yaml") == ["age1a", "age1op"]
    assert readers("hosts/beta/discord_token.yaml") == ["age1b", "age1op"]
    for other in ("x/hosts/alpha/a.yaml", "hosts/alpha/a.yaml.bak", "hosts/alpha/b/a.yaml", "hosts/alphax/a.yaml"):
        assert readers(other) == []


def test_sops_rules_do_not_depend_on_order():
    one = sops_config({"a": "age1a", "b": "age1b"}, ["age1x", "age1y"])
    assert one == sops_config({"b": "age1b", "a": "age1a"}, ["age1y", "age1x"])
