"""The checks that need nothing but the clone. Pure: a snapshot in, verdicts out."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import yaml

from clawdlets_ops.doctor import supply
from clawdlets_ops.doctor.clone import UNREADABLE
from clawdlets_ops.doctor.judging import Verdict, beside, failed, passed, settled, unknown, without
from clawdlets_ops.doctor.snapshot import Blind, NotHere, Repo, Scan, Snapshot, Wrong
from clawdlets_ops.fleet import Fleet
from clawdlets_ops.guard.hooks import HOOKS
from clawdlets_ops.guard.scan import Leak
from clawdlets_ops.guard.sopsfiles import MISSING
from clawdlets_ops.secrets.status import SSH_KEY, Row, State

RUNTIME_RULES = frozenset({"path-runtime-dir", "path-age-key", "path-tofu-state", "path-tofu-plan"})
KNOWN_SECRET = "known-secret"  # noqa: S105 - the name of a rule
PUBLIC_FILES = frozenset({"fleet/clawdlets.json", "flake.nix", "flake.lock"})
_PATH_REFERENCE = re.compile(r"(?<![\w$%-])path:(?=[./~$])[^\s\"';,)\]}]*")
RECIPIENT_RULES = frozenset({"secrets-foreign-recipient", MISSING})
NOT_LOOKED_FOR = "a file with known secrets could not be read"
"""What the guard says of its needles; it is a gap of GIT-05 alone."""
DEPENDABOT = (".github/dependabot.yml", ".github/dependabot.yaml")


def _repo(snapshot: Snapshot) -> Repo:
    if snapshot.repo is None:
        raise ValueError("the clone was not looked at")
    return snapshot.repo


# --- fleet ---


def fleet_is_acceptable(snapshot: Snapshot) -> Iterable[Verdict]:
    """FLT-01."""
    if isinstance(snapshot.fleet, Wrong):
        return [failed(snapshot.fleet.why)]
    return [passed(f"{len(snapshot.fleet.hosts)} hosts, {len(snapshot.fleet.operators)} operators declared")]


def exposure_is_temporary(snapshot: Snapshot) -> Iterable[Verdict]:
    """EXP-08, as far as the declaration says it."""
    if isinstance(snapshot.fleet, Wrong):
        return [unknown("the fleet file is not acceptable (FLT-01)")]
    return [_exposure(snapshot.fleet, host) for host in snapshot.hosts]


def _exposure(fleet: Fleet, host: str) -> Verdict:
    mode = fleet.hosts[host].ssh_exposure.mode
    said = f"sshExposure.mode is {mode}"
    if mode == "bootstrap":
        return failed(f"{said}: the public window stays open, and lockdown is not attempted", host)
    return passed(said if mode == "tailnet" else f"{said}: open to adminCidrs for good, as declared", host)


# --- git ---


def runtime_dir_is_ignored(snapshot: Snapshot) -> Iterable[Verdict]:
    """GIT-01: by a rule that every clone has."""
    return [ignored(_repo(snapshot).ignored)]


def ignored(git: Mapping[str, Any] | Blind) -> Verdict:
    """The verdict on what ``git_evidence`` saw."""
    if isinstance(git, Blind):
        return unknown(git.why)
    if git["problem"] or not git["checkout"]:
        return unknown(git["problem"] or "the project is not a git checkout")
    faults = []
    for entry in git["paths"]:
        source = entry["source"]
        if not source or entry["pattern"].startswith("!"):
            faults.append(f"{entry['path']} is not ignored")
        elif source.rpartition("/")[2] != ".gitignore":
            faults.append(f"{entry['path']} is ignored by {source} only, which other clones do not have")
        elif not entry["tracked"]:
            faults.append(f"{entry['path']} is ignored by {source}, which is not tracked")
    return settled(faults, f"ignored by the tracked {', '.join(sorted({e['source'] for e in git['paths']}))}")


def nothing_private_in_git(snapshot: Snapshot) -> Iterable[Verdict]:
    """GIT-02: neither in the index nor in any tree that git stores."""
    return [_from_scans(snapshot, ("index", "history"), lambda leak: leak.rule in RUNTIME_RULES)]


def no_secret_in_tree(snapshot: Snapshot) -> Iterable[Verdict]:
    """GIT-03."""
    return [_from_scans(snapshot, ("index", "work tree"), lambda leak: _by_rule(leak) and not _is_public_file(leak))]


def no_secret_in_history(snapshot: Snapshot) -> Iterable[Verdict]:
    """GIT-04: what is only in history; what is in the tree as well is told by GIT-03 and GIT-06."""
    now = {_mark(leak) for name in ("index", "work tree") for leak in _leaks(_repo(snapshot).scans[name])}
    return [
        _from_scans(snapshot, ("history",), lambda leak: (_by_rule(leak) or _is_sops(leak)) and _mark(leak) not in now)
    ]


def no_known_secret(snapshot: Snapshot) -> Iterable[Verdict]:
    """GIT-05: the values themselves, in the forms they leak in."""
    repo = _repo(snapshot)
    names = ("index", "work tree", "history")
    leaks = [leak for name in names for leak in _leaks(repo.scans[name]) if leak.what == NOT_LOOKED_FOR]
    more = [repo.not_opened.why] if isinstance(repo.not_opened, Blind) else list(repo.not_opened)
    gaps = [*dict.fromkeys(leak.path for leak in leaks), *more]
    verdict = _from_scans(snapshot, names, lambda leak: leak.rule == KNOWN_SECRET, gaps=gaps)
    scans = [scan for scan in repo.scans.values() if isinstance(scan, Scan)]
    if verdict.state == "pass" and not max((scan.needles for scan in scans), default=0):
        return [beside("no secret is known on this machine (no keys, no settings), so there is none to look for")]
    return [verdict]


def public_files_hold_no_secret(snapshot: Snapshot) -> Iterable[Verdict]:
    """GIT-06."""
    return [_from_scans(snapshot, ("index", "work tree"), lambda leak: _by_rule(leak) and _is_public_file(leak))]


def hooks_are_installed(snapshot: Snapshot) -> Iterable[Verdict]:
    """GIT-07."""
    hooks = _repo(snapshot).hooks
    if isinstance(hooks, Blind):
        return [unknown(hooks.why)]
    missing = [f"{name} is not ours, or cannot be run" for name in HOOKS if name not in hooks.ours]
    return [settled(missing, f"{' and '.join(HOOKS)} in {hooks.folder}")]


def _from_scans(
    snapshot: Snapshot, names: Collection[str], wanted: Callable[[Leak], bool], *, gaps: Iterable[str] = ()
) -> Verdict:
    scans = _repo(snapshot).scans
    faults, gaps, seen = [], list(gaps), []
    for name in names:
        scan = scans[name]
        if isinstance(scan, Blind):
            gaps.append(f"{name}: {scan.why}")
            continue
        seen.append(f"{name}: {scan}")
        gaps += [f"{leak.path}: {leak.what}" for leak in scan.leaks if leak.unknown and leak.what != NOT_LOOKED_FOR]
        faults += [_place(leak) for leak in scan.leaks if not leak.unknown and wanted(leak)]
    return settled(list(dict.fromkeys(faults)), "; ".join(seen), gaps=list(dict.fromkeys(gaps)))


def _leaks(scan: Scan | Blind) -> tuple[Leak, ...]:
    return scan.leaks if isinstance(scan, Scan) else ()


def _by_rule(leak: Leak) -> bool:
    return not _is_sops(leak) and leak.rule != KNOWN_SECRET and leak.rule not in RUNTIME_RULES


def _is_sops(leak: Leak) -> bool:
    return leak.rule.startswith("secrets-")


def _is_public_file(leak: Leak) -> bool:
    return any(leak.path == name or leak.path.endswith(f"/{name}") for name in PUBLIC_FILES)


def _mark(leak: Leak) -> tuple[str, str]:
    return leak.rule, leak.fingerprint or f"{leak.path} {leak.what}"


def _place(leak: Leak) -> str:
    place = f"{leak.path}:{leak.line}" if leak.line else leak.path
    return f"{place} {leak.rule} ({leak.what})"


# --- encrypted files ---


def files_are_encrypted(snapshot: Snapshot) -> Iterable[Verdict]:
    """SOP-01."""
    return [_of_sops(snapshot, frozenset({"secrets-not-encrypted"}))]


def files_are_wholly_encrypted(snapshot: Snapshot) -> Iterable[Verdict]:
    """SOP-02."""
    return [_of_sops(snapshot, frozenset({"secrets-partly-encrypted", "secrets-foreign-rules"}))]


def readers_are_exact(snapshot: Snapshot) -> Iterable[Verdict]:
    """SOP-03: nobody more, nobody less."""
    repo = _repo(snapshot)
    if isinstance(repo.sops, Blind):
        return [unknown(repo.sops.why)]
    faults: dict[str, str] = {}
    gaps: list[str] = []
    for name, found in repo.sops.items():
        for fault in found:
            if fault.rule not in RECIPIENT_RULES:
                continue
            if host := _without_key(repo, name):
                gaps.append(f"{name}: host {host} has no public key here (SOP-07)")
            elif not any(isinstance(key, str) for key in repo.operator_keys.values()) and not _declared(snapshot):
                gaps.append(f"{name}: no operator is known (SOP-07)")
            else:
                faults[f"secrets/{name.removeprefix('index:')}"] = f"secrets/{name} {fault.what}"
    for row in _rows(snapshot, gaps):
        if {State.OVER_SHARED, State.UNDER_SHARED} & set(row.states):
            faults.setdefault(row.file, f"{row.file} {row.observed}")
    if not repo.sops and not gaps:
        return [beside("there is no file under secrets/")]
    return [settled(list(faults.values()), f"{len(repo.sops)} files", gaps=gaps)]


def secrets_are_there(snapshot: Snapshot) -> Iterable[Verdict]:
    """SOP-05: one finding for each host."""
    gaps: list[str] = []
    rows = _rows(snapshot, gaps)
    if gaps:
        return [unknown("; ".join(gaps))]
    decrypts = _repo(snapshot).decrypts
    return [_there(host, [row for row in rows if row.host == host], decrypts=decrypts) for host in snapshot.hosts]


def nothing_stale(snapshot: Snapshot) -> Iterable[Verdict]:
    """SOP-06."""
    gaps: list[str] = []
    stale = [f"{row.file} ({row.why})" for row in _rows(snapshot, gaps) if State.STALE in row.states]
    return [settled(stale, "every file is needed by a host", gaps=gaps)]


def everybody_has_a_key(snapshot: Snapshot) -> Iterator[Verdict]:
    """SOP-07: hosts and operators of the fleet file, and the public keys in the repository, are the same."""
    repo, fleet = _repo(snapshot), snapshot.fleet
    if isinstance(fleet, Wrong):
        yield unknown("the fleet file is not acceptable (FLT-01)")
        return
    for host in snapshot.hosts:
        key = repo.host_keys[host]
        if isinstance(key, str):
            yield passed(f"reads as {key}", host)
        else:
            yield failed(f"its age key: {key.why}", host, f"clawdlets secrets init --host {host}")
    faults = [
        f"keys/hosts/{host}.age.pub belongs to no host of the fleet"
        for host in repo.host_keys
        if host not in fleet.hosts
    ]
    faults += [
        f"keys/operators/{name}.age.pub: {key.why}"
        for name, key in repo.operator_keys.items()
        if isinstance(key, Wrong)
    ]
    for name, operator in fleet.operators.items():
        have = repo.operator_keys.get(name)
        if have is None:
            faults.append(f"the operator {name} has no keys/operators/{name}.age.pub")
        elif isinstance(have, str) and have != operator.age_recipient:
            faults.append(f"keys/operators/{name}.age.pub is not the ageRecipient that the fleet file has")
    if fleet.operators:
        strays = sorted(repo.operator_keys.keys() - fleet.operators.keys())
        faults += [f"keys/operators/{name}.age.pub belongs to no declared operator" for name in strays]
    elif not repo.operator_keys:
        faults.append("no operator has a public key: nobody could read a secret")
    yield settled(faults, f"operators: {', '.join(repo.operator_keys)}")


def sops_config_is_current(snapshot: Snapshot) -> Iterable[Verdict]:
    """SOP-08."""
    current = _repo(snapshot).sops_config
    if isinstance(current, Blind | NotHere):
        return [without(current)]
    return [passed("as generated") if current else failed("secrets/.sops.yaml is not what the declared readers make")]


def hosts_are_pinned(snapshot: Snapshot) -> Iterator[Verdict]:
    """SSH-09, the repository's part: the key, and that the private half belongs to it."""
    gaps: list[str] = []
    rows = {row.host: row for row in _rows(snapshot, gaps) if row.name == SSH_KEY}
    if isinstance(snapshot.fleet, Wrong):
        yield unknown("the fleet file is not acceptable (FLT-01)")
    for host in snapshot.hosts:
        pin = _repo(snapshot).pins[host]
        if not isinstance(pin, str):
            yield failed(f"its SSH host key: {pin.why}", host)
        elif host in rows and "private half" in rows[host].observed:
            yield failed(rows[host].observed, host)
        else:
            yield passed(f"{pin.split()[0]} is pinned", host)


def _of_sops(snapshot: Snapshot, rules: frozenset[str]) -> Verdict:
    files = _repo(snapshot).sops
    if isinstance(files, Blind):
        return unknown(files.why)
    if not files:
        return beside("there is no file under secrets/")
    found = [(name, fault) for name, faults in files.items() for fault in faults]
    faults = [f"secrets/{name} {fault.what}" for name, fault in found if fault.rule in rules]
    gaps = [f"secrets/{name} {fault.what}" for name, fault in found if fault.rule == UNREADABLE]
    return settled(faults, f"{len(files)} files", gaps=gaps)


def _without_key(repo: Repo, name: str) -> str | None:
    parts = name.removeprefix("index:").split("/")
    if len(parts) == 3 and parts[0] == "hosts" and parts[1] in repo.host_keys:
        return None if isinstance(repo.host_keys[parts[1]], str) else parts[1]
    return None


def _declared(snapshot: Snapshot) -> bool:
    return isinstance(snapshot.fleet, Fleet) and bool(snapshot.fleet.operators)


def _rows(snapshot: Snapshot, gaps: list[str]) -> tuple[Row, ...]:
    if isinstance(snapshot.rows, tuple):
        return snapshot.rows
    gaps.append(snapshot.rows.why if snapshot.rows else "the secrets were not looked at")
    return ()


def _there(host: str, rows: list[Row], *, decrypts: bool) -> Verdict:
    lacking = {State.MISSING, State.PLACEHOLDER}
    faults = [f"{row.name} {state}" for row in rows for state in row.states if state in lacking]
    gaps = [f"{row.name}: {row.observed}" for row in rows if State.UNREADABLE in row.states and not _mismatch(row)]
    fix = "; ".join(dict.fromkeys(row.fix for row in rows if lacking & set(row.states)))
    holds = f"{len(rows)} files" if decrypts else f"{len(rows)} files; no key is here that opens them"
    return settled(faults, holds, host, gaps=gaps if decrypts else (), fix=fix)


def _mismatch(row: Row) -> bool:
    return "private half" in row.observed


# --- what the project refers to ---


def no_flake_by_path(snapshot: Snapshot) -> Iterable[Verdict]:
    """STO-07: such a reference copies the whole folder, ignored keys too, into the store."""
    texts = _repo(snapshot).texts
    if isinstance(texts, Blind):
        return [unknown(texts.why)]
    whole = {path: content for path, content in texts.items() if content is not None}
    faults = [f"{path}:{number} {found}" for path, content in whole.items() for number, found in references(content)]
    gaps = [f"{path} is too large to be looked at" for path, content in texts.items() if content is None]
    return [settled(faults, f"{len(texts)} tracked files", gaps=gaps)]


def references(content: bytes) -> Iterator[tuple[int, str]]:
    """Line and words of every flake reference by path; a comment is none."""
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
        if not line.lstrip().startswith(("#", "//")) and (match := _PATH_REFERENCE.search(line)):
            yield number, match.group()


def actions_are_pinned(snapshot: Snapshot) -> Iterable[Verdict]:
    """SUP-01."""
    return [_of_workflows(snapshot, supply.unpinned)]


def nothing_merges_by_itself(snapshot: Snapshot) -> Iterable[Verdict]:
    """SUP-03."""
    return [_of_workflows(snapshot, supply.merging)]


def dependabot_is_weekly(snapshot: Snapshot) -> Iterable[Verdict]:
    """SUP-02."""
    texts = _repo(snapshot).texts
    if isinstance(texts, Blind):
        return [unknown(texts.why)]
    workflows = any(supply.is_workflow(path) for path in texts)
    found = {path: texts[path] for path in DEPENDABOT if path in texts}
    if not found:
        fault = "there are workflows, and no .github/dependabot.yml"
        return [failed(fault)] if workflows else [beside("the project has no workflows")]
    faults: list[str] = []
    gaps: list[str] = []
    for path, document in _parsed(found, gaps):
        faults += [f"{path} {gap}" for gap in supply.dependabot_gaps(document, workflows=workflows)]
    return [settled(faults, "every week", gaps=gaps)]


def inputs_are_locked(snapshot: Snapshot) -> Iterable[Verdict]:
    """SUP-05."""
    repo = _repo(snapshot)
    if isinstance(repo.flake_lock, Wrong | NotHere):
        return [without(repo.flake_lock)]
    faults = supply.lock_faults(repo.flake_lock)
    if not isinstance(repo.texts, Blind) and not any(path.rpartition("/")[2] == "flake.lock" for path in repo.texts):
        faults.append("flake.lock is not tracked")
    return [settled(faults, "every input has a revision and a hash")]


def _of_workflows(snapshot: Snapshot, faults_of: Callable[[Any], list[str]]) -> Verdict:
    texts = _repo(snapshot).texts
    if isinstance(texts, Blind):
        return unknown(texts.why)
    found = {path: content for path, content in texts.items() if supply.is_workflow(path)}
    if not found:
        return beside("the project has no workflows")
    gaps: list[str] = []
    faults = [f"{path} {fault}" for path, document in _parsed(found, gaps) for fault in faults_of(document)]
    return settled(faults, f"{len(found)} workflows", gaps=gaps)


def _parsed(texts: Mapping[str, bytes | None], gaps: list[str]) -> Iterator[tuple[str, Any]]:
    for path, content in texts.items():
        try:
            yield path, yaml.safe_load(content or b"")
        except (yaml.YAMLError, ValueError, RecursionError):
            gaps.append(f"{path} is not YAML")
        else:
            if content is None:
                gaps.append(f"{path} is too large to be looked at")
