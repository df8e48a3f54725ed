"""The fleet file's cattle section: deny by default, caps that hold together, nothing of an operator's for a persona."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clawdlets_ops.errors import FleetError
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.herd import Cattle, seconds, secrets_of

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s canary@example"
REX = {"secrets": {"MODEL_API_KEY": "model_api_key"}}


def document(cattle: dict[str, Any], **host: Any) -> str:
    alpha = {
        "provisioning": {"adminCidrs": ["203.0.113.0/24"]},
        "sshAuthorizedKeys": [KEY],
        "secrets": {"model_api_key": {}},
    }
    return json.dumps({"schemaVersion": 1, "hosts": {"alpha": {**alpha, **host}}, "cattle": cattle})


def herd(**cattle: Any) -> Cattle:
    return parse_fleet(document(cattle)).cattle


def test_without_a_word_there_is_no_cattle_and_nobody_may_ask() -> None:
    cattle = herd()
    assert not cattle.enabled
    assert (dict(cattle.bots), dict(cattle.personas)) == ({}, {})
    assert cattle.tailnet.key == "minted"


def test_a_whole_section_is_accepted() -> None:
    cattle = herd(
        enabled=True, host="alpha", bots={"maren": {"personas": ["rex"], "maxTtl": "10m"}}, personas={"rex": REX}
    )
    assert cattle.personas["rex"].command == ("./run",)
    assert secrets_of(cattle) == {"model_api_key": ("rex",)}


@pytest.mark.parametrize(
    ("cattle", "said"),
    [
        ({"enabled": True}, "host is not named"),
        ({"host": "beta"}, "there is no host beta"),
        ({"defaultTtl": "9h"}, "defaultTtl 9h and maxTtl 8h"),
        ({"maxTtl": "8d"}, "7d at most"),
        ({"defaultTtl": "forever"}, "cattle.defaultTtl"),
        ({"defaultTtl": "0m"}, "cattle.defaultTtl"),
        ({"tokenTtl": "29s"}, "30s to 1h"),
        ({"tokenTtl": "61m"}, "30s to 1h"),
        ({"maxInstances": 0}, "cattle.maxInstances"),
        ({"maxInstances": 2}, "maxPerBot is more than maxInstances"),
        ({"images": []}, "cattle.images"),
        ({"images": ["debian 12"]}, "cattle.images"),
        ({"labels": {"clawdlets-job": "x"}}, "clawdlets-job is set by clawdlets"),
        ({"labels": {"managed-by": "me"}}, "managed-by is set by clawdlets"),
        ({"bots": {"maren": {"personas": ["rex"]}}}, "bots.maren.personas: there is no persona rex"),
        ({"bots": {"maren": {"personas": []}}}, "cattle.bots.maren.personas"),
        ({"bots": {"maren": {"personas": ["rex"], "maxTtl": "9h"}}, "personas": {"rex": {}}}, "bots.maren.maxTtl"),
        ({"bots": {"maren": {"personas": ["rex"], "images": ["x"]}}, "personas": {"rex": {}}}, "bots.maren.images"),
        ({"bots": {"maren": {"personas": ["rex"], "serverTypes": []}}, "personas": {"rex": {}}}, "bots.maren.serverTypes"),
        ({"personas": {"../x": {}}}, "cattle.personas"),
        ({"personas": {"rex": {"variables": {"LD_PRELOAD": "/x"}}}}, "LD_PRELOAD is set on the machine"),
        ({"personas": {"rex": {"variables": {"PATH": "/x"}}}}, "PATH is set on the machine"),
        ({"personas": {"rex": {"variables": {"A": "1\n2"}}}}, "cattle.personas.rex.variables.A"),
        ({"personas": {"rex": {"secrets": {"T": "hcloud_token"}}}}, "hcloud_token never leaves the host"),
        ({"personas": {"rex": {"secrets": {"T": "tailscale_oauth_client_secret"}}}}, "never leaves the host"),
        ({"personas": {"rex": {"anyOf": [["A", "B"]]}}}, "anyOf names A, which is not in secrets"),
        ({"personas": {"rex": {"variables": {"A": "1"}, "secrets": {"A": "b"}}}}, "A is both in variables and in secrets"),
        ({"host": "alpha", "personas": {"rex": {"secrets": {"T": "other"}}}}, "alpha has no secret other"),
        ({"tailnet": {"keyTtl": "2h"}}, "1m to 1h"),
        ({"tailnet": {"tag": "clawdlets"}}, "cattle.tailnet.tag"),
        ({"maxInstance": 3}, "did you mean 'maxInstances'?"),
    ],
)  # fmt: skip
def test_a_wrong_section_is_refused_with_its_key_path(cattle: dict[str, Any], said: str) -> None:
    with pytest.raises(FleetError) as caught:
        parse_fleet(document(cattle))
    assert said in str(caught.value)


def test_cattle_needs_a_host_on_the_tailnet() -> None:
    with pytest.raises(FleetError, match="alpha is not on the tailnet"):
        parse_fleet(
            document({"enabled": True, "host": "alpha"}, tailnet={"mode": "none"}, sshExposure={"mode": "public"})
        )


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("5m", 300), ("2h", 7200), ("7d", 604800)])
def test_durations(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "5", "m", "-5m", "5 m", "1.5h", "5M", "5m\n", "05m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        seconds(text)
