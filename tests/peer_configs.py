"""Configurations of the other clawdlets, by version, made up after the fields that each version has.

The shapes (which keys, where, which defaults are written out) are those of its template and of its schema at the commits
that are named in docs/howto/import.md; names and values are our own.
"""

from __future__ import annotations

import copy
from typing import Any

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s ops@example"
OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s two@example"
CACHES = {"substituters": ["https://cache.example.org"], "trustedPublicKeys": ["cache.example.org-1:AAAA="]}


def v12() -> dict[str, Any]:
    """As its template writes it: nothing decided yet, not to be deployed as it stands."""
    return {
        "schemaVersion": 12,
        "defaultHost": "first-box",
        "baseFlake": "",
        "fleet": {
            "secretEnv": {}, "secretFiles": {}, "sshAuthorizedKeys": [], "sshKnownHosts": [], "botOrder": ["agent"],
            "bots": {"agent": {"profile": {"secretEnv": {}, "secretFiles": {}}, "clawdbot": {"channels": {}}}},
            "codex": {"enable": False, "bots": []},
            "backups": {"restic": {"enable": False, "repository": ""}},
        },
        "cattle": {
            "enabled": False,
            "hetzner": {"image": "", "serverType": "cx22", "location": "nbg1", "maxInstances": 10, "defaultTtl": "2h", "labels": {"managed-by": "clawdlets"}},
            "defaults": {"autoShutdown": True, "callbackUrl": ""},
        },
        "hosts": {
            "first-box": {
                "enable": False, "diskDevice": "/dev/sda", "flakeHost": "", "hetzner": {"serverType": "cx22"},
                "provisioning": {"adminCidr": "", "adminCidrAllowWorldOpen": False, "sshPubkeyFile": "~/.ssh/id_ed25519.pub"},
                "cache": {**CACHES, "netrc": {"enable": False, "secretName": "a_netrc", "path": "/etc/nix/netrc", "narinfoCachePositiveTtl": 3600}},
                "operator": {"deploy": {"enable": False}},
                "sshExposure": {"mode": "bootstrap"}, "tailnet": {"mode": "none"},
            }
        },
    }  # fmt: skip


def lived_in() -> dict[str, Any]:
    """A v12 that somebody uses: two hosts, three bots, secrets of every kind."""
    document = v12()
    fleet = document["fleet"]
    fleet["sshAuthorizedKeys"] = [KEY]
    fleet["sshKnownHosts"] = ["203.0.113.9 " + KEY]
    fleet["secretEnv"] = {"MODEL_API_KEY": "Model-Api-Key"}
    fleet["secretFiles"] = {
        "netrc": {"secretName": "shared_netrc", "targetPath": "/var/lib/clawdlets/secrets/netrc", "mode": "0444"}
    }
    fleet["botOrder"] = ["maren", "two_words"]
    fleet["bots"] = {
        "maren": {
            "profile": {
                "secretEnv": {"DISCORD_BOT_TOKEN": "discord_token_maren"},
                "secretFiles": {"pem": {"secretName": "app_key", "targetPath": "/var/lib/clawdlets/secrets/bots/maren/app.pem", "mode": "0400", "format": "raw"}},
                "github": {"appId": 7, "privateKeySecret": "app_key"},
            },
            "clawdbot": {"channels": {"discord": {"enabled": True}}},
        },
        "two_words": {"profile": {}, "clf": {}},
    }  # fmt: skip
    first = document["hosts"].pop("first-box")
    first["provisioning"]["adminCidr"] = "203.0.113.7/32"
    first |= {"enable": True, "sshExposure": {"mode": "tailnet"}, "tailnet": {"mode": "tailscale"}}
    second = copy.deepcopy(first)
    first["targetHost"] = "admin@100.64.0.9"
    second |= {
        "targetHost": "admin@203.0.113.20",
        "selfUpdate": {"enable": True, "baseUrls": ["http://example.org"], "allowUnsigned": True},
    }
    second["hetzner"] = {"serverType": "cax21", "location": "fsn1", "image": "116"}
    second["provisioning"] |= {"adminCidr": "2001:db8:7::/48", "sshPubkeyFile": "$HOME/.ssh/other.pub"}
    document["hosts"] = {"alpha": first, "bravo": second}
    document["defaultHost"] = "alpha"
    return document


def of_version(version: int) -> dict[str, Any]:
    """The used one as each version before had it, back to 7; what a step changed is undone, newest first."""
    document = lived_in()
    document["schemaVersion"] = version
    fleet, hosts = document["fleet"], document["hosts"].values()
    for host in hosts:
        if version < 12 and "selfUpdate" in host:
            host["selfUpdate"]["baseUrl"] = host["selfUpdate"].pop("baseUrls")[0]
        if version < 11:
            host["cache"] = {
                "garnix": {"private": {"enable": False, "netrcSecret": "a_netrc", "netrcPath": "/etc/nix/netrc"}}
            }
            if "selfUpdate" in host:
                host["selfUpdate"]["manifestUrl"] = host["selfUpdate"].pop("baseUrl")
        if version < 10:
            host["sshAuthorizedKeys"], host["sshKnownHosts"] = [KEY, OTHER_KEY], []
        if version < 8:
            host["provisioning"].pop("adminCidrAllowWorldOpen")
            host.pop("sshExposure")  # its default was tailnet then
    if version < 10:
        del fleet["sshAuthorizedKeys"], fleet["sshKnownHosts"]
    if version < 9:
        fleet["guildId"], fleet["envSecrets"] = "1", fleet.pop("secretEnv")
        fleet["bots"]["maren"]["profile"]["discordTokenSecret"] = "discord_token_maren"
    return document


def infra2() -> dict[str, Any]:
    """The later product's infrastructure file: no cattle, bots of each host, another provider possible."""
    return {
        "schemaVersion": 2,
        "defaultHost": "claw-box",
        "baseFlake": "",
        "fleet": {
            "secretEnv": {}, "secretFiles": {}, "sshAuthorizedKeys": [KEY], "sshKnownHosts": [],
            "codex": {"enable": False}, "backups": {"restic": {"enable": False, "repository": ""}},
        },
        "hosts": {
            "claw-box": {
                "enable": True, "theme": {"emoji": "x", "color": "red"}, "diskDevice": "/dev/sda", "flakeHost": "",
                "gateways": {"main": {"profile": {"secretEnv": {"MODEL_API_KEY": "model_api_key"}}, "openclaw": {}}}, "gatewaysOrder": ["main"],
                "openclaw": {"enable": True},
                "hetzner": {"serverType": "cpx22", "location": "hel1", "allowTailscaleUdpIngress": False, "volumeSizeGb": 50, "volumeLinuxDevice": "/dev/sdb"},
                "aws": {"region": "", "instanceType": ""},
                "provisioning": {"provider": "hetzner", "adminCidr": "203.0.113.0/24", "adminCidrAllowWorldOpen": False, "sshPubkeyFile": ""},
                "sshExposure": {"mode": "tailnet"}, "tailnet": {"mode": "tailscale"},
                "selfUpdate": {"enable": False, "previousPublicKeys": []},
            }
        },
    }  # fmt: skip
