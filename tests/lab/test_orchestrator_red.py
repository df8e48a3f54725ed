"""The red tests of the orchestrator, on a real machine that has it: each seeded fault turns exactly the checks red that are
about it. What is broken in the installed code is broken there, on that host alone."""

from __future__ import annotations

import json

import pytest

from clawdlets_ops.lab.host_orchestrator import BUNDLE
from tests.lab.conftest import LabProject
from tests.lab.red import Bench, Seed

# Nine judgements by the whole suite: told with LONG=1. Good and bad evidence is judged in tests/unit/test_verify_orchestrator.py.
pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(900)]

STATE = "/var/lib/clf/orchestrator"
TOKENS = f"/{BUNDLE}/clawdlets_ops/orchestrator/tokens.py"
UNDO_TOKENS = f"cp -p /run/kept-tokens {TOKENS}"
AS_SERVICE = "setpriv --reuid clf-orchestrator --regid clf-orchestrator --clear-groups python3 -c"
SQL = f'{AS_SERVICE} \'import sqlite3, sys; c = sqlite3.connect("{STATE}/state.sqlite", isolation_level=None); c.execute("pragma secure_delete=on"); c.execute(sys.argv[1], sys.argv[2:])\''
ROW = 'insert into tokens(token_hash, purpose, job_id, requester, node, created_at, expires_at, spec_json) values (?, "environment", "seed", "maren", "m", 0, 600000, ?)'
PLAIN = "0123456789abcdef" * 4
FORGET = f"{SQL} 'delete from tokens where job_id = \"seed\"'; {SQL} 'pragma wal_checkpoint(truncate)'"  # noqa: S608 - shell for a lab machine


def in_tokens(what: str) -> str:
    """Shell that changes the installed code, and fails when it changes nothing."""
    return f"sed -i '{what}' {TOKENS}; ! cmp -s {TOKENS} /run/kept-tokens"


SEEDS = [
    Seed("a socket for everybody", "ORC-01", "chmod 0666 /run/clf/orchestrator.sock; chmod 0755 /run/clf", "chmod 0660 /run/clf/orchestrator.sock; chmod 0750 /run/clf"),
    Seed("a stranger among the bots", "ORC-01", "usermod -aG clf-bots breakglass", "gpasswd -d breakglass clf-bots"),
    Seed("a journal of the database that others can read", "ORC-02", f"chmod 0644 {STATE}/state.sqlite-wal", f"chmod 0600 {STATE}/state.sqlite-wal"),
    Seed("a copy of the database that others can read", "ORC-02", f"touch {STATE}/state.sqlite.bak; chmod 0644 {STATE}/state.sqlite.bak", f"rm {STATE}/state.sqlite.bak"),
    Seed("a token in the database as it is", "ORC-03", f"{SQL} '{ROW}' $(printf %s {PLAIN} | sha256sum | cut -c1-64) {PLAIN}", FORGET),
    Seed("a secret of the host in the database", "ORC-03", f"{SQL} '{ROW}' $(printf %s 1 | sha256sum | cut -c1-64) \"$(cat $(readlink -f /run/secrets)/discord_token)\"", FORGET),
    Seed("what machines fetch, on every address", "ORC-04", "systemctl stop clf-orchestrator.service; until ! ss -Hltn | grep -q :18337; do :; done; systemd-run -q --unit=everywhere python3 -m http.server 18337; until ss -Hltn | grep -q :18337; do :; done", "systemctl stop everywhere; systemctl restart clf-orchestrator; until ss -Hltn | grep -q '100[.].*:18337'; do sleep 0.1; done"),
    Seed("tokens that live for ten hours", "TOK-01", in_tokens("s/^TTL_MAX_S = 3600/TTL_MAX_S = 36000/"), UNDO_TOKENS),
    Seed("tokens that are good more than once", "TOK-02", in_tokens("s/raise Refused(\"used\")/pass/"), UNDO_TOKENS),
    Seed("tokens that are written down", "TOK-03", in_tokens("s/return hashlib.sha256(token.encode()).hexdigest()/return token/"), UNDO_TOKENS),
]  # fmt: skip


@pytest.fixture(scope="module")
def host(project: LabProject) -> Bench:
    document = json.loads((project.root / "fleet" / "clawdlets.json").read_text())
    document["hosts"]["alpha"]["orchestrator"] = {"enable": True}
    (project.root / "fleet" / "clawdlets.json").write_text(json.dumps(document, indent=2))
    project.bootstrap()
    made = Bench(project)
    made.sh(f"cp -p {TOKENS} /run/kept-tokens")
    return made


@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_a_seeded_fault_turns_exactly_its_checks_red(host: Bench, seed: Seed) -> None:
    host.proves(seed)


def test_all_is_mended_and_the_orchestrator_is_judged(host: Bench) -> None:
    states = {one["check"]: one["state"] for one in host.report().document["findings"]}
    assert {check for check, state in states.items() if state in ("fail", "unknown")} == set(), states
    assert {states[ident] for ident in ("ORC-01", "ORC-02", "ORC-03", "ORC-04", "TOK-01", "TOK-02", "TOK-03")} == {
        "pass"
    }
