"""Verifies again and again, and tells when something came out otherwise: a line, a web hook, a Prometheus textfile."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import requests

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.files import write_atomic
from clawdlets_ops.finding import State
from clawdlets_ops.journal import printable
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.verify import fleet
from clawdlets_ops.verify.fleet import FleetReport, States
from clawdlets_ops.verify.fleet_report import NEW

HOOK_TIMEOUT_S = 10.0
_NUMBERS = {State.PASS: 1, State.FAIL: 0, State.UNKNOWN: -1, State.NOT_APPLICABLE: 2}


def watch(
    verify: Callable[[], FleetReport],
    *,
    every_s: float,
    times: int | None,
    wait: Callable[[float], bool],
    say: Callable[[str], None],
    textfile: Path | None = None,
    hook: Secret | None = None,
) -> int:
    """Call ``verify`` every ``every_s`` seconds, ``times`` times or until ``wait`` says True (somebody ended it).

    Returns the exit status of the last verification, 2 when it could not be made. The first one is always told of, later
    ones when a check or the verdict changed, since the last look or since the last report. ``hook`` is a URL that gets a
    POST with ``{summary, exitCode, changes}`` as JSON; one that fails is told of and tried again with the next change.
    """
    done, last = 0, None
    known: States = {}
    while True:
        try:
            document = verify().document
        except ClawdletsError as error:
            document = {"summary": f"could not verify: {error.what}", "exitCode": 2, "changes": []}
        document, known = _since(known, document)
        code: int = document["exitCode"]
        verdict = (code, "findings" in document)
        if document["changes"] or verdict != last:
            say(printable("; ".join([document["summary"], *map(_told, document["changes"])])))
            if hook is not None:
                _post(hook, document, say)
        last = verdict
        if textfile is not None:
            write_atomic(textfile, metrics(document), mode=0o644)
        done += 1
        if done == times or wait(every_s):
            return code


def metrics(document: Mapping[str, Any]) -> str:
    """The report in Prometheus' text format (exposition formats, prometheus.io): 1 pass, 0 fail, -1 unknown, 2 not applicable."""
    lines = [
        "# HELP clawdlets_verify_exit_code 0 all passed, 1 something failed, 2 something is unknown.",
        "# TYPE clawdlets_verify_exit_code gauge",
        f"clawdlets_verify_exit_code {document['exitCode']}",
    ]
    if "findings" in document:
        lines += [
            "# HELP clawdlets_check_state 1 pass, 0 fail, -1 unknown, 2 not applicable.",
            "# TYPE clawdlets_check_state gauge",
        ]
        lines += [
            f'clawdlets_check_state{{host="{one["host"]}",check="{one["check"]}"}} {_NUMBERS[State(one["state"])]}'
            for one in document["findings"]
        ]
    return "\n".join(lines) + "\n"


def _since(known: States, document: Mapping[str, Any]) -> tuple[Mapping[str, Any], States]:
    """The report with what is otherwise than ``known`` among its changes, and what is known now: somebody else may have
    verified since, and a report is compared with theirs."""
    if "findings" not in document:
        return document, known
    if not known:
        return document, fleet.last_known(document)
    found = {
        (change["host"], change["check"]): change
        for change in (*document["changes"], *fleet.differences(known, document["findings"]))
    }
    after = fleet.known_after(known, document["findings"], whole=not document.get("only"))
    return {**document, "changes": list(found.values())}, after


def _told(change: Mapping[str, str]) -> str:
    return f"{change['host']} {change['check']}: {change['was'] or NEW} → {change['now']}"


def _post(hook: Secret, document: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """The URL is a secret: whoever has it can speak in our name. It is in no message, and no proxy of the environment sees it."""
    body = {key: document[key] for key in ("summary", "exitCode", "changes")}
    with requests.Session() as session:
        session.trust_env = False
        try:
            answer = session.post(
                hook.reveal(), data=json.dumps(body), timeout=HOOK_TIMEOUT_S, allow_redirects=False,
                headers={"Content-Type": "application/json"},
            )  # fmt: skip
        except requests.RequestException as error:
            say(f"the web hook was not reached ({type(error).__name__})")
        else:
            if not answer.ok:
                say(f"the web hook answered with status {answer.status_code}")
