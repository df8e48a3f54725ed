"""A project for a user: everything that a fleet's repository begins with, planned as texts, then put in place as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from clawdlets_ops import declare, fleetfile
from clawdlets_ops.fleet import json_schema, parse_fleet
from clawdlets_ops.scaffold.shipped import texts
from clawdlets_ops.scaffold.source import Source

FLEET_FILE = "fleet/clawdlets.json"
SCHEMA_FILE = "fleet/clawdlets.schema.json"

LAB_CIDRS = ("198.18.0.0/24", "2001:2::/64")
"""What the lab gives its operators (RFC 2544, RFC 5180: for benchmarks, never routed)."""
LAB_PUBKEY_FILE = ".clawdlets/keys/operators/ssh_ed25519.pub"
"""Made by ``clawdlets lab up``."""

_COPIED = {
    ".gitignore": "gitignore",
    ".github/dependabot.yml": "dependabot.yml",
    ".github/workflows/fleet.yml": "fleet.yml",
}
_RENDERED = {"README.md": "README.md.in", "flake.nix": "flake.nix.in", "requirements.txt": "requirements.txt.in"}


@dataclass(frozen=True)
class Plan:
    """Path below the project and content of every file. Nothing in it is secret."""

    name: str
    host: str
    files: Mapping[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.files))
        return "\n".join(f"{path:{width}}  {len(text.encode()):6} bytes" for path, text in self.files.items())


def plan(name: str, host: str, wish: declare.Wish, *, origin: Source, rehearsal: bool = False) -> Plan:
    """The project ``name`` with one host. ``rehearsal``: ready for the lab, whose networks and key then fill what was not
    said. FleetError, with the key path, when what was said makes no acceptable host."""
    if rehearsal:
        wish = declare.filled(wish, admin_cidrs=LAB_CIDRS, ssh_pubkey_file=LAB_PUBKEY_FILE)
    fleet = fleetfile.to_text(starter(host, wish))
    parse_fleet(fleet, where=FLEET_FILE)
    values = {
        "name": name,
        "name_in_nix": _within_nix_quotes(name),
        "host": host,
        "source": origin.flake,
        "requirement": origin.requirement,
        "unlocated": not origin.located,
        "rehearsal": rehearsal,
    }
    files = {
        **{path: _text(template, values) for path, template in _RENDERED.items()},
        FLEET_FILE: fleet,
        SCHEMA_FILE: json.dumps(json_schema(), indent=2) + "\n",
        **texts("inventory", ".py"),
        **texts("deploys", ".py"),
        **{path: _template(template) for path, template in _COPIED.items()},
    }
    return Plan(name, host, dict(sorted(files.items())))


def starter(host: str, wish: declare.Wish) -> dict[str, Any]:
    """The fleet file of a new project: one host, each part with a comment for whoever edits it next."""
    annotated: dict[str, Any] = {
        "hetzner": {
            "$comment": "What to order. image is only what the installation starts from; NixOS replaces it.",
            "serverType": "cx23",
            "location": "nbg1",
        },
        "provisioning": {
            "$comment": "Who reaches SSH until lockdown: your own networks, IPv4 and IPv6. The key logs in as admin; its line is in sshAuthorizedKeys, for the flake cannot read files of a home folder.",
        },
        "sshExposure": {
            "$comment": "tailnet: public SSH only until lockdown. bootstrap: not locked down yet. public: open for good.",
            "mode": "tailnet",
        },
        "tailnet": {"mode": "tailscale"},
        "egress": {
            "$comment": "smtp-only: no mail goes out, the web is open. proxy-allowlist: only allowedDomains are reached.",
            "mode": "smtp-only",
        },
        "secrets": {
            "$comment": 'Names, never values: "discord_token": {"owner": "bot-maren"} is /run/secrets/discord_token there.',
        },
    }
    entry = declare.entry(wish, annotated)
    entry["secrets"] = {"$comment": annotated["secrets"]["$comment"], **entry["secrets"]}
    return {
        "$schema": "./clawdlets.schema.json",
        "$comment": "The declared fleet. Public: it holds names of secrets, never secrets. clawdlets fleet validate checks it.",
        "schemaVersion": fleetfile.SCHEMA_VERSION,
        "hosts": {host: entry},
    }


def _within_nix_quotes(text: str) -> str:
    """``text`` as it stands between the quotes of a string of Nix, where ``${`` begins code."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")


def _template(name: str) -> str:
    return resources.files("clawdlets_ops.scaffold").joinpath("project", name).read_text(encoding="utf-8")


def _text(template: str, values: Mapping[str, object]) -> str:
    # Not the usual braces: Nix, GitHub's workflows and JSON have those for themselves.
    environment: Any = Environment(
        variable_start_string="<<", variable_end_string=">>", block_start_string="<%", block_end_string="%>",
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False,  # noqa: S701  (no HTML)
    )  # fmt: skip
    text: str = environment.from_string(_template(template)).render(**values)
    return text
