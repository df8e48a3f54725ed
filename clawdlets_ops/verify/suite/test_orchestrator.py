"""The orchestrator: its socket is the bots', its state is its own, what machines fetch is on the tailnet, tokens are short and
good once."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from .reading import NotApplicable, Unknown, listeners, parent_faults, path_faults, section, settle, stats, users

Observe = Callable[[str], None]

SOCKET = "/run/clf/orchestrator.sock: bot-facing control-plane socket (group clf-bots)"
STATE = (
    "/var/lib/clf/orchestrator/state.sqlite: orchestrator DB (job payloads/results + token hashes; 0600/0700 scoped)"
)
FETCHED = "one-time bootstrap token + baseUrl so the VM can fetch runtime env from clf-orchestrator"
TOKENS = "Keep bootstrap tokens short-lived + one-time (clamped to 30s..1h; default minutes)."
TAILNETS = (ipaddress.ip_network("100.64.0.0/10"), ipaddress.ip_network("fd7a:115c:a1e0::/48"))
SHORTEST_S, LONGEST_S = 30, 3600
RESULT_LONGEST_S = 8 * 24 * 3600
DEFAULT_LONGEST_S = 900  # "minutes"
FACTS_VERSION = 1


def declared(expected: Mapping[str, Any]) -> dict[str, Any]:
    """What is declared of the orchestrator; NotApplicable where it is not."""
    found: dict[str, Any] | None = expected.get("orchestrator")
    if found is None:
        raise NotApplicable("hosts.<host>.orchestrator is not enabled")
    return found


def told(facts: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A part of what clf-orchestrator says of itself; Unknown when it is not there, or not understood."""
    text = section(facts, "orchestrator").strip()
    if text == "absent":
        raise Unknown("there is no clf-orchestrator on the host")
    try:
        document = json.loads(text.splitlines()[-1])
        version, found = document["factsVersion"], dict(document[part])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Unknown(f"what clf-orchestrator says of itself is not understood: {type(error).__name__}") from None
    if version != FACTS_VERSION:
        raise Unknown(f"clf-orchestrator speaks version {version} of its facts, not {FACTS_VERSION}")
    if found.get("problem"):
        raise Unknown(str(found["problem"]))
    return found


def number(part: Mapping[str, Any], name: str) -> float:
    """A number among the facts; Unknown when it is none."""
    found = part.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Unknown(f"clf-orchestrator does not say {name}")
    return found


@pytest.mark.check(
    id="ORC-01",
    severity="high",
    claim=SOCKET,
    expect="0660 of the bots' group in a folder of root's; bots and operators alone are in the group and can connect",
    fix="0660 root:clf-bots, its folder 0750; only bots (and operators) in the group clf-bots; restart clf-orchestrator.socket",
)
def test_the_socket_is_the_bots(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Mode, owner and group of the socket and its folder, who is in the group, and real attempts to connect: by root (the
    control), every bot, everybody in the groups, and nobody."""
    wanted = declared(expected)
    found, people = stats(section(facts, "files")), users(facts)
    stat = found.get(wanted["socket"]["path"])
    faults = path_faults(found, wanted["runDir"])
    faults += path_faults(found, {**wanted["socket"], "owner": _owner(stat.owner if stat else "", wanted)})
    if wanted["runDir"]["path"] in found:
        faults += parent_faults(found, ("/run", wanted["runDir"]["path"]))
    group = {name for name, user in people.items() if wanted["botsGroup"] in user.groups}
    operators = {name for name, user in people.items() if wanted["operatorsGroup"] in user.groups}
    faults += [f"{bot} is not in {wanted['botsGroup']}" for bot in sorted(set(wanted["bots"]) - group)]
    faults += [
        f"{name} is in {wanted['botsGroup']}, and is neither a bot nor an operator"
        for name in sorted(group - set(wanted["bots"]) - operators)
    ]
    settle(faults, "")
    attempts = told(facts, "socket")
    if attempts.get("root") != "ok":
        raise Unknown(f"the control failed: not even root could connect ({attempts.get('root')})")
    if missing := sorted({"nobody", *group} - attempts.keys()):
        raise Unknown(f"{missing[0]} did not try to connect")
    for name, answer in sorted(attempts.items()):
        if answer == "ok" and name not in group | {"root"}:
            faults.append(f"{name} can connect to {wanted['socket']['path']}")
        elif answer == "EACCES" and name in group:
            faults.append(f"{name} cannot connect to {wanted['socket']['path']}")
        elif answer not in ("ok", "EACCES"):
            raise Unknown(f"{name} could not try to connect ({answer})")
    observe(
        settle(faults, f"{', '.join(sorted(group))} can connect; {', '.join(sorted(attempts.keys() - group))} tried")
    )


def _owner(seen: str, wanted: Mapping[str, Any]) -> str:
    """Root's where systemd made the socket, the service's own where it did."""
    own: str = wanted["stateDir"]["owner"]
    return own if seen == own else str(wanted["socket"]["owner"])


@pytest.mark.check(
    id="ORC-02",
    severity="high",
    claim=STATE,
    expect="the folder 0700, each file of the database 0600, all the service's own",
    fix="chmod 0700 the folder and 0600 its files (also -wal and -shm), UMask=0077 in the unit; what was open may have been read",
)
def test_the_state_is_private(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Owner and mode of the state's folder and of everything in it, whatever it is called: -wal, -shm, copies."""
    wanted = declared(expected)
    found = stats(section(facts, "files"))
    folder, owner = wanted["stateDir"]["path"], wanted["stateDir"]["owner"]
    if wanted["store"] != "sqlite" and folder not in found:
        raise NotApplicable("the store is a PostgreSQL server of its own, and there is no folder")
    faults = path_faults(found, wanted["stateDir"])
    if wanted["store"] == "sqlite":
        faults += path_faults(found, wanted["database"])
    inside = {path: stat for path, stat in found.items() if path.startswith(f"{folder}/")}
    for path, stat in sorted(inside.items()):
        if stat.mode & 0o077:
            faults.append(f"{path} is open to others ({stat.mode:04o})")
        if stat.owner != owner:
            faults.append(f"{path} belongs to {stat.owner}, expected {owner}")
    faults += parent_faults(found, ("/var", "/var/lib"))
    parent = found.get(folder.rpartition("/")[0])
    if parent is not None and (parent.mode & 0o022 or parent.owner not in ("root", owner)):
        faults.append(f"{parent.path} can be changed by others ({parent.owner} {parent.mode:04o})")
    observe(settle(faults, f"{folder} 0700, {len(inside)} files 0600, all of {owner}"))


@pytest.mark.check(
    id="ORC-03",
    severity="high",
    claim=STATE,
    expect="no token and no secret of the host in any byte of the database, freed pages too; the search finds the hashes",
    fix="stop the service, remove the state, replace what was found; secure_delete has to be on",
)
def test_the_database_holds_hashes(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """The bytes of the database and its journal: texts whose hash is a token's, and the host's decrypted secrets. The search
    has to find the tokens' hashes, and the name of their column, first."""
    if declared(expected)["store"] != "sqlite":
        raise NotApplicable("the store is a PostgreSQL server of its own: its bytes are not on this host")
    store = told(facts, "store")
    secrets = store.get("secrets")
    if store.get("kind") != "sqlite" or not isinstance(secrets, list):
        raise Unknown("clf-orchestrator does not say what is in its store")
    count, plain, hashed = number(store, "tokens"), number(store, "plaintext"), number(store, "hashed")
    faults = [f"{plain:g} tokens stand in the database as they are"] if plain else []
    faults += [f"{count - hashed:g} of {count:g} tokens are not kept as hashes"] if hashed != count else []
    faults += [f"{name} stands in the database" for name in secrets]
    seen = settle(faults, f"{count:g} tokens, of which there are only hashes; none of the host's secrets")
    if store.get("control") is not True:
        raise Unknown("the search did not find what must be in the database")
    observe(seen)


@pytest.mark.check(
    id="ORC-04",
    severity="high",
    claim=FETCHED,
    expect="what machines fetch is served on a tailnet address, and on no other",
    fix="bootstrap.listen: auto in /etc/clf/orchestrator.json; no other program on this port",
)
def test_machines_are_served_on_the_tailnet(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Every listener on the declared port, whatever holds it: a wildcard is a fault also behind a firewall."""
    port = declared(expected)["port"]
    there = [one for one in listeners(facts) if one.port == port]
    seen = settle(
        [f"{one} is not on the tailnet" for one in there if not _on_tailnet(one.address)],
        f"{', '.join(map(str, there))}",
    )
    if not there and expected["tailnet"]["mode"] == "none":
        raise NotApplicable("tailnet.mode is none: nothing listens for machines, and nothing can")
    if not there:
        raise Unknown(f"nothing listens on port {port}: the orchestrator is not on the tailnet (yet)")
    observe(seen)


def _on_tailnet(address: str) -> bool:
    try:
        one = ipaddress.ip_address(address)
    except ValueError:
        return False  # "*", all of them
    return any(one in network for network in TAILNETS)


@pytest.mark.check(
    id="TOK-01",
    severity="high",
    claim=TOKENS,
    expect="whatever is asked for, a token lives for 30 s to 1 h, and for minutes by default; those in the store too",
    fix="install clf-orchestrator again: what is installed there does not clamp",
)
def test_tokens_are_short_lived(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """The installed code issues tokens for sixteen lives, sensible and not (negative, infinite, no number), in a store that is
    thrown away; and how long the tokens in the real store live."""
    wanted = declared(expected)
    lives = told(facts, "rehearsal").get("lives")
    if not isinstance(lives, list) or not all(isinstance(one, list) and len(one) == 2 for one in lives):
        raise Unknown("clf-orchestrator does not say how long its tokens live")
    asked = {str(name): number({"life": life}, "life") for name, life in lives}
    if missing := {"-1", "0", "29", "30", "3600", "3601", "nan", "inf", "'5m'", "None"} - asked.keys():
        raise Unknown(f"no token was asked for that lives {min(missing)}")
    faults = [
        f"a token asked for {name} s lives {life:g} s"
        for name, life in asked.items()
        if not SHORTEST_S <= life <= LONGEST_S
    ]
    faults += [
        f"a token that may live {name} s lives {asked[name]:g} s"
        for name in ("30", "3600")
        if asked[name] != float(name)
    ]
    if asked["None"] > DEFAULT_LONGEST_S:
        faults.append(f"by default a token lives {asked['None']:g} s")
    count = 0.0
    if wanted["store"] == "sqlite":
        store = told(facts, "store")
        count = number(store, "tokens")
        for purpose, (shortest, longest) in sorted(dict(store.get("livesS") or {}).items()):
            most = RESULT_LONGEST_S if purpose == "result" else LONGEST_S
            if shortest < SHORTEST_S or longest > most:
                faults.append(f"a token in the store ({purpose}) lives from {shortest:g} to {longest:g} s")
    observe(
        settle(
            faults,
            f"{len(asked)} lives asked for, {count:g} tokens in the store: 30 s to 1 h, {asked['None']:g} s by default",
        )
    )


@pytest.mark.check(
    id="TOK-02",
    severity="critical",
    claim=TOKENS,
    expect="of fifty who show one token at once, exactly one gets an answer, and nobody later",
    fix="install clf-orchestrator again: what is installed there gives a token's environment more than once",
)
def test_tokens_are_good_once(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """The installed code, in a store that is thrown away: fifty threads behind one barrier, then one more."""
    declared(expected)
    once = told(facts, "rehearsal").get("atOnce")
    if not isinstance(once, dict) or number(once, "asked") < 50:
        raise Unknown("clf-orchestrator does not say what became of a token that fifty show at once")
    granted, later = number(once, "granted"), once.get("later")
    faults = [f"{granted:g} of {once['asked']:g} who showed one token at once got an answer"] if granted > 1 else []
    faults += ["a token that was used is still good"] if later == "granted" else []
    seen = settle(faults, f"1 of {once['asked']:g} at once, then: {later}")
    if granted != 1:
        raise Unknown("not even one who showed a good token got an answer")
    if later != "used":
        raise Unknown(f"a token that was used is refused for another reason ({later})")
    observe(seen)


@pytest.mark.check(
    id="TOK-03",
    severity="high",
    claim=TOKENS,
    expect="256 bits, each another; refused after its end and to any other machine; only its hash is written",
    fix="install clf-orchestrator again; replace every secret that a machine could have fetched meanwhile",
)
def test_tokens_are_for_one_machine(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """The installed code, in a store that is thrown away: who is refused, while the right machine would not be; how tokens
    look; and the bytes that were written, in which every hash must be found, and no token."""
    declared(expected)
    rehearsal = told(facts, "rehearsal")
    refusals, many, written = (rehearsal.get(name) for name in ("refusals", "many", "written"))
    if not isinstance(refusals, dict) or not isinstance(many, dict) or not isinstance(written, dict):
        raise Unknown("clf-orchestrator does not say whom it refuses")
    made = number(many, "made")
    shown = {"after its end", "another server", "another machine", "another purpose", "a guess"}
    if missing := sorted(shown - refusals.keys()):
        raise Unknown(f"nobody showed a token: {missing[0]}")
    faults = [f"a token is good: {how}" for how, answer in sorted(refusals.items()) if answer == "granted"]
    if number(many, "different") != made or number(many, "formed") != made:
        faults.append(f"of {made:g} tokens {many['different']:g} are different, {many['formed']:g} have 64 hex digits")
    if number(written, "plaintext"):
        faults.append(f"{written['plaintext']:g} of {made:g} tokens are written down as they are")
    seen = settle(
        faults, f"{made:g} tokens of 256 bits, hashes alone are written; refused: {', '.join(sorted(refusals))}"
    )
    if rehearsal.get("stillGood") != "granted":
        raise Unknown("the control failed: the right machine was refused as well")
    if number(written, "hashes") == 0 or made < 50:
        raise Unknown("the control failed: no hash was found where they are written")
    observe(seen)
