"""What ``clf-orchestrator --facts`` tells a verification of this host, run as root: who really reaches the socket, what the
store really holds, and what this installation's own code does with tokens.

The last is a rehearsal: the installed code, in a private store that is thrown away. Nothing here prints a token, a hash or a
secret; of secrets only names, of tokens only how long they live and what became of them.
"""

from __future__ import annotations

import errno
import grp
import hashlib
import json
import os
import pwd
import re
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from clawdlets_ops.errors import ClawdletsError
from clawdlets_ops.orchestrator.daemon import Config
from clawdlets_ops.orchestrator.identity import BOT_USER_PREFIX
from clawdlets_ops.orchestrator.store import open_sqlite, tokens
from clawdlets_ops.orchestrator.tokens import Asker, Grant, Purpose, Refused, Tokens

FACTS_VERSION = 1
CONNECT_WITHIN_S = 5.0
AT_ONCE = 50
MANY = 64
NEEDLE_MIN_CHARS = 12
STORE_LIMIT_BYTES = 512 * 1024 * 1024
ASKED_S: tuple[object, ...] = (
    *(-1, 0, 29, 30, 31, 600, 3599, 3600, 3601, 1e12, "abc", None, float("nan"), float("inf"), "5m", True),
)
_HEX = re.compile(rb"(?=([0-9a-f]{64}))")
_FORM = re.compile(r"[0-9a-f]{64}")


def gather(config: Config, folder: Path) -> dict[str, Any]:
    """All of it; ``folder`` is private and empty. Has to be called as root before any thread was started (it forks)."""
    store = store_facts(config) if config.store == "sqlite" else {"kind": config.store}
    return {
        "factsVersion": FACTS_VERSION,
        "socket": {
            user: attempt(config.socket_path, user) for user in users_to_try(config.bots_group, config.operators_group)
        },
        "store": store,
        "rehearsal": rehearse(folder),
    }


def users_to_try(bots_group: str, operators_group: str) -> list[str]:
    """Every bot, everybody who is in one of the groups, root (the control) and nobody."""
    names = {"root", "nobody", *(one.pw_name for one in pwd.getpwall() if one.pw_name.startswith(BOT_USER_PREFIX))}
    for group in (bots_group, operators_group):
        try:
            found = grp.getgrnam(group)
        except KeyError:
            continue
        names |= {*found.gr_mem, *(one.pw_name for one in pwd.getpwall() if one.pw_gid == found.gr_gid)}
    return sorted(names)


def attempt(path: str, user: str) -> str:
    """Connect to the socket as ``user``, in a process of its own: ``ok`` or the name of the error."""

    def connect() -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
            one.settimeout(CONNECT_WITHIN_S)
            try:
                one.connect(path)
            except OSError as error:
                return errno.errorcode.get(error.errno or 0, "failed").encode()
        return b"ok"

    return as_user(user, connect).decode() or "failed"


def as_user(user: str, do: Callable[[], bytes]) -> bytes:
    """What ``do`` gives in a child that is ``user``, with that user's groups and no way back; nothing when it failed."""
    entry = pwd.getpwnam(user)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            if os.getuid() == 0:
                os.initgroups(user, entry.pw_gid)
                os.setgid(entry.pw_gid)
                os.setuid(entry.pw_uid)
            with os.fdopen(writing, "wb") as out:
                out.write(do())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        said = answer.read()
    _, status = os.waitpid(child, 0)
    return said if status == 0 else b""


def store_facts(config: Config) -> dict[str, Any]:
    """The SQLite store: read-only, as its owner, so that no file of it becomes root's; and its bytes, as they are."""
    path = Path(config.database)
    try:
        owner = pwd.getpwuid(path.stat().st_uid).pw_name
        pages = [
            one.read_bytes()
            for one in (path, Path(f"{path}-wal"))
            if one.exists() and one.stat().st_size <= STORE_LIMIT_BYTES
        ]
    except (OSError, KeyError) as error:
        return {"kind": "sqlite", "problem": f"{path} cannot be read ({type(error).__name__})"}
    said = as_user(owner, lambda: json.dumps(token_rows(path)).encode())
    if not said:
        return {"kind": "sqlite", "problem": f"{path} could not be opened as {owner}"}
    return {"kind": "sqlite", **judge_bytes(json.loads(said), pages, needles(map(Path, config.secret_folders)))}


def token_rows(path: Path) -> list[dict[str, Any]]:
    """Hash, purpose and life of every token in the store, which is not written to."""
    engine = sa.create_engine(f"sqlite:///file:{path}?mode=ro&uri=true")
    try:
        with engine.connect() as connection:
            columns = (tokens.c.token_hash, tokens.c.purpose, tokens.c.created_at, tokens.c.expires_at)
            return [dict(row) for row in connection.execute(sa.select(*columns)).mappings()]
    finally:
        engine.dispose()


def judge_bytes(
    rows: Sequence[dict[str, Any]], pages: Iterable[bytes], known: Iterable[tuple[str, bytes]]
) -> dict[str, Any]:
    """What the store holds, without showing it. Pure.

    ``plaintext``: how many of its own tokens stand in its bytes, also in freed pages: a text whose hash is a token's.
    ``secrets``: names of the host's secrets that stand in it. ``control``: whether the search finds what must be there.
    """
    blob = b"\0".join(pages)
    hashes = {row["token_hash"] for row in rows}
    runs = {match[1] for match in _HEX.finditer(blob)}
    lives: dict[str, list[float]] = {}
    for row in rows:
        lives.setdefault(row["purpose"], []).append((row["expires_at"] - row["created_at"]) / 1000)
    return {
        "tokens": len(rows),
        "hashed": sum(1 for one in hashes if _FORM.fullmatch(one)),
        "livesS": {purpose: [min(some), max(some)] for purpose, some in sorted(lives.items())},
        "plaintext": sum(1 for run in runs if hashlib.sha256(run).hexdigest() in hashes),
        "secrets": sorted({name for name, value in known if value in blob}),
        "control": b"token_hash" in blob and all(one.encode() in runs for one in hashes if _FORM.fullmatch(one)),
    }


def needles(folders: Iterable[Path]) -> list[tuple[str, bytes]]:
    """Name and longest line of each decrypted secret; short ones are words of any text, and left out."""
    found = []
    for folder in folders:
        for path in sorted(one for one in folder.rglob("*") if one.is_file()) if folder.is_dir() else ():
            longest = max(path.read_bytes().splitlines(), key=len, default=b"")
            if len(longest) >= NEEDLE_MIN_CHARS:
                found.append((path.name, longest))
    return found


def rehearse(folder: Path) -> dict[str, Any]:
    """What the installed code makes of tokens, in a store of its own in ``folder`` (0700), by a clock of its own."""
    now = [1_000_000_000_000]
    path = folder / "rehearsal.sqlite"
    try:
        store = open_sqlite(path)
    except ClawdletsError as error:
        return {"problem": str(error)}
    made = Tokens(store, lambda: now[0])

    def issued(job: str, ttl_s: object = 600) -> str:
        token = made.issue(Grant(job, "rehearsal", "machine", Purpose.ENVIRONMENT), ttl_s=ttl_s).reveal()
        made.bind(job, server_id=7)
        return token

    def shown(token: str, purpose: Purpose = Purpose.ENVIRONMENT, **asker: Any) -> str:
        usual = {"address": "100.64.0.7", "node": "machine", "server_id": 7}
        try:
            made.redeem(token, purpose, Asker(**{**usual, **asker}), lambda _: None)
        except Refused as error:
            return error.reason
        return "granted"

    def life_s(job: str) -> float:
        wanted = sa.select(tokens.c.expires_at - tokens.c.created_at).where(tokens.c.job_id == job)
        return float(store.read(lambda connection: connection.execute(wanted).scalar_one())) / 1000

    try:
        # As many at once: they share their commits, and the disk is not asked to be quick.
        with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
            list(pool.map(lambda one: issued(f"life-{one[0]}", one[1]), enumerate(ASKED_S)))
            lives = [[repr(asked), life_s(f"life-{number}")] for number, asked in enumerate(ASKED_S)]
            some = list(pool.map(issued, [f"one-of-many-{number}" for number in range(MANY)]))
            shared, gate = issued("at-once"), threading.Barrier(AT_ONCE)

            def at_once(_: int) -> str:
                gate.wait(30)
                return shown(shared)

            answers = list(pool.map(at_once, range(AT_ONCE)))
        later = shown(shared)
        good = issued("refusals")
        refusals = {
            "another server": shown(good, server_id=8),
            "another machine": shown(good, node="other"),
            "another purpose": shown(good, Purpose.RESULT),
            "a guess": shown("0" * 64),
        }
        short = issued("short", 30)
        now[0] += 30_000
        refusals["after its end"] = shown(short)
        still = shown(good)
        written = b"\0".join(one.read_bytes() for one in folder.iterdir() if one.is_file())
    finally:
        store.close()
    everything = [*some, shared, good, short]
    return {
        "lives": lives,
        "atOnce": {"asked": AT_ONCE, "granted": answers.count("granted"), "later": later},
        "refusals": refusals,
        "stillGood": still,
        "many": {
            "made": len(everything),
            "different": len(set(everything)),
            "formed": sum(1 for one in everything if _FORM.fullmatch(one)),
        },
        "written": {
            "plaintext": sum(1 for one in everything if one.encode() in written),
            "hashes": sum(1 for one in everything if hashlib.sha256(one.encode()).hexdigest().encode() in written),
        },
    }
