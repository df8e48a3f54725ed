"""The checks on this machine and on what was deployed from it. Pure: a snapshot in, verdicts out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from clawdlets_ops.cattle.labels import ORCHESTRATOR, missing
from clawdlets_ops.doctor.bench import TOOLS, Tool
from clawdlets_ops.doctor.judging import Verdict, beside, failed, passed, settled, some, unknown, without
from clawdlets_ops.doctor.snapshot import (
    Bench,
    Blind,
    Deployed,
    Field,
    NotHere,
    Opened,
    PathSeen,
    Snapshot,
    ToolSeen,
    Wrong,
)
from clawdlets_ops.doctor.store import StoreSearch
from clawdlets_ops.hetzner import HOST_LABEL, MANAGED_BY, MANAGER, is_ours
from clawdlets_ops.layout import RUNTIME_DIR

FREE_BYTES = 2 * 1024**3
_OTHERS = 0o077
_OTHERS_WRITE = 0o022
_WORLD_WRITES = 0o002
_STICKY = 0o1000


def _bench(snapshot: Snapshot) -> Bench:
    if snapshot.bench is None:
        raise ValueError("this machine was not looked at")
    return snapshot.bench


def _field(snapshot: Snapshot) -> Field:
    if snapshot.field is None:
        raise ValueError("what is deployed was not looked at")
    return snapshot.field


# --- bootstrap ---


def settings_can_be_read(snapshot: Snapshot) -> Iterable[Verdict]:
    """ENV-01."""
    if isinstance(snapshot.fleet, Wrong):
        return [unknown("the fleet file is not acceptable (FLT-01)")]
    if isinstance(snapshot.project, Wrong):
        return [failed(snapshot.project.why)]
    vantages = ", ".join(vantage.name for vantage in snapshot.project.vantages)
    return [passed(f"operator {snapshot.project.operator}, vantages {vantages}")]


def programs_are_there(snapshot: Snapshot) -> Iterable[Verdict]:
    """TOOL-01: one finding for each program."""
    return [_program(tool, seen) for tool, seen in zip(TOOLS, _bench(snapshot).tools, strict=True)]


def _program(tool: Tool, seen: ToolSeen) -> Verdict:
    if not seen.where:
        return (
            beside(f"{tool.name}: {tool.optional}")
            if tool.optional
            else failed(f"{tool.name} is not there", fix=tool.fix)
        )
    if seen.problem:
        return unknown(f"{tool.name}: {seen.problem}")
    if tool.oldest and tuple(int(part) for part in seen.version.split(".")) < tool.oldest:
        oldest = ".".join(map(str, tool.oldest))
        return failed(f"{tool.name} {seen.version} ({seen.where}); {oldest} is the oldest that will do", fix=tool.fix)
    return passed(f"{tool.name} {seen.version} ({seen.where})".replace("  ", " "))


def token_is_accepted(snapshot: Snapshot) -> Iterable[Verdict]:
    """HCL-01."""
    token = _bench(snapshot).token
    return [passed(token) if isinstance(token, str) else without(token)]


def ssh_keys_are_usable(snapshot: Snapshot) -> Iterator[Verdict]:
    """KEY-01."""
    for host in snapshot.hosts:
        key = _bench(snapshot).ssh_keys[host]
        yield passed(key, host) if isinstance(key, str) else without(key, host)


def operator_has_a_key(snapshot: Snapshot) -> Iterable[Verdict]:
    """KEY-02."""
    identity = _bench(snapshot).identity
    if isinstance(snapshot.project, Wrong):
        return [unknown(snapshot.project.why)]
    if not isinstance(identity, str):
        return [failed(identity.why)]
    return [passed(f"{snapshot.project.operator} reads as {identity}")]


def operator_decrypts(snapshot: Snapshot) -> Iterable[Verdict]:
    """SOP-04."""
    return [_decrypts(_bench(snapshot).opened, "")]


def hosts_decrypt(snapshot: Snapshot) -> Iterable[Verdict]:
    """SOP-09."""
    if isinstance(snapshot.fleet, Wrong):
        return [unknown("the fleet file is not acceptable (FLT-01)")]
    return [_decrypts(_bench(snapshot).opened_by_host[host], host) for host in snapshot.hosts]


def _decrypts(opened: Opened | Blind, host: str) -> Verdict:
    if isinstance(opened, Blind):
        return unknown(opened.why, host)
    if not opened.good and not opened.bad:
        return beside("there is nothing encrypted yet", host)
    faults = [f"{path} {why}" for path, why in opened.bad.items()]
    return settled(faults, f"{len(opened.good)} files, each MAC verified", host)


def runtime_dir_is_private(snapshot: Snapshot) -> Iterable[Verdict]:
    """RTD-01."""
    runtime = _bench(snapshot).runtime
    if isinstance(runtime, Blind | NotHere):
        return [without(runtime)]
    faults = [fault for seen in runtime if (fault := _path_fault(seen, _bench(snapshot).uid))]
    return [settled(faults, f"{len(runtime)} paths, owned by this user, open to nobody else")]


def nobody_else_writes(snapshot: Snapshot) -> Iterable[Verdict]:
    """RTD-06."""
    public, uid = _bench(snapshot).public, _bench(snapshot).uid
    if isinstance(public, Blind):
        return [unknown(public.why)]
    faults = [f"{seen.path} belongs to user {seen.owner}" for seen in public if seen.owner not in (uid, 0)]
    faults += [f"{seen.path} has mode {seen.mode:04o}" for seen in public if _world_writes(seen)]
    return [settled(faults, f"{len(public)} paths")]


def _world_writes(seen: PathSeen) -> bool:
    sticky = seen.kind == "directory" and seen.mode & _STICKY
    return seen.kind != "link" and bool(seen.mode & _WORLD_WRITES) and not sticky


def _path_fault(seen: PathSeen, uid: int) -> str:
    """What is wrong with a path of the runtime dir. Below a payload and the lab's folder modes are those of other
    machines, behind the 0700 of the folder itself; OpenTofu links its providers."""
    parts = seen.path.split("/")
    if parts[1:2] == ["extra-files"] and len(parts) > 3:
        return ""
    if parts[1:2] == ["lab"] and len(parts) > 2:
        return ""
    if seen.kind == "link":
        return "" if ".terraform" in parts else f"{seen.path} is a symbolic link to {seen.link}"
    if seen.owner != uid:
        return f"{seen.path} belongs to user {seen.owner}"
    if ".terraform" in parts[:-1] or (parts[1:2] == ["extra-files"] and len(parts) == 3) or parts[-1].endswith(".pub"):
        wide = seen.mode & _OTHERS_WRITE
    elif seen.path.startswith(f"{RUNTIME_DIR}/infra/opentofu/") and len(parts) > 4:
        wide = 0  # OpenTofu's own files, in a 0700 folder; those that hold values are RTD-03's
    else:
        wide = seen.mode & _OTHERS
    return f"{seen.path} has mode {seen.mode:04o}" if wide else ""


def state_is_clean(snapshot: Snapshot) -> Iterable[Verdict]:
    """RTD-03."""
    state = _bench(snapshot).state
    if isinstance(state, Blind | NotHere):
        return [without(state)]
    faults = [f"{path} {fault}" for path, found in state.items() for fault in found]
    return [settled(faults, f"{len(state)} files, {_bench(snapshot).needles} known secrets looked for")]


def disk_has_room(snapshot: Snapshot) -> Iterable[Verdict]:
    """SYS-01."""
    free = _bench(snapshot).free_bytes
    if isinstance(free, Blind):
        return [unknown(free.why)]
    said = f"{free / 1024**3:.1f} GiB free"
    return [passed(said) if free >= FREE_BYTES else failed(said)]


# --- deploy ---


def payload_is_minimal(snapshot: Snapshot) -> Iterator[Verdict]:
    """RTD-02."""
    for host, seen in _hosts(snapshot):
        if isinstance(seen, Verdict):
            yield seen
        elif isinstance(seen.payload_digest, NotHere):
            yield beside(seen.payload_digest.why, host)
        elif seen.odd or isinstance(seen.payload_digest, str):
            yield settled(seen.odd, "exactly what an installation needs", host)
        else:
            yield failed(seen.payload_digest.why, host)


def nothing_is_left_over(snapshot: Snapshot) -> Iterator[Verdict]:
    """RTD-05: private keys in clear after they have served, and what interrupted writes left."""
    temporaries = _field(snapshot).temporaries
    if isinstance(temporaries, Blind):
        yield unknown(temporaries.why)
    else:
        yield settled([f"{path} was left by an interrupted write" for path in temporaries], "no interrupted writes")
    for host, seen in _hosts(snapshot):
        if isinstance(seen, Verdict):
            yield seen
        elif isinstance(seen.payload_digest, NotHere):
            yield passed("no keys in clear", host)
        elif seen.verified:
            yield failed(
                f"its keys lie in clear in {RUNTIME_DIR}/extra-files/{host}, and it is installed and verified", host
            )
        else:
            yield beside("it is not installed and verified yet, so its payload is still needed", host)


def digests_agree(snapshot: Snapshot) -> Iterator[Verdict]:
    """DRF-01: the set of secrets as the repository makes it, as the payload has it, as it was installed."""
    for host, seen in _hosts(snapshot):
        yield seen if isinstance(seen, Verdict) else _agreement(host, seen)


def _agreement(host: str, seen: Deployed) -> Verdict:
    tree, installed = seen.payload_digest, seen.installed_digest
    if isinstance(tree, NotHere) and isinstance(installed, NotHere):
        return beside("there is no payload here, and it was not installed from here", host)
    if isinstance(seen.repo_digest, Blind):
        return unknown(f"the repository's set: {seen.repo_digest.why}", host)
    faults, gaps, same = [], [], []
    if seen.odd or isinstance(tree, Wrong):
        gaps.append("the payload is not what it should be (RTD-02)")
    elif isinstance(tree, str) and tree != seen.repo_digest:
        faults.append(f"payload {tree[:12]}, repository {seen.repo_digest[:12]}")
    elif isinstance(tree, str):
        same.append("payload")
    if isinstance(installed, str) and installed != seen.repo_digest:
        gaps.append("it was installed with an older set; only the host can tell whether it was brought up to date")
    elif isinstance(installed, str):
        same.append("installed")
    return settled(faults, f"repository = {' = '.join(same)} ({seen.repo_digest[:12]})", host, gaps=gaps)


def installed_with_the_pin(snapshot: Snapshot) -> Iterator[Verdict]:
    """DRF-02."""
    for host, seen in _hosts(snapshot):
        if isinstance(seen, Verdict):
            yield seen
        elif isinstance(seen.receipt_key, NotHere | Wrong):
            yield without(seen.receipt_key, host)
        elif isinstance(seen.pin_fingerprint, NotHere):
            yield failed(f"was installed with {seen.receipt_key}, and {seen.pin_fingerprint.why}", host)
        else:
            same = seen.receipt_key == seen.pin_fingerprint
            fault = f"was installed with {seen.receipt_key}, pinned is {seen.pin_fingerprint}"
            yield settled([] if same else [fault], f"installed with {seen.receipt_key}", host)


def closure_holds_no_secret(snapshot: Snapshot) -> Iterable[Verdict]:
    """STO-01."""
    return [_searched(_field(snapshot).closure)]


def store_holds_no_secret(snapshot: Snapshot) -> Iterable[Verdict]:
    """STO-05."""
    return [_searched(_field(snapshot).store)]


def _searched(found: StoreSearch | Blind | NotHere) -> Verdict:
    if isinstance(found, Blind | NotHere):
        return without(found)
    faults = [f"{hit.path} holds {hit.secret}" for hit in found.hits]
    gaps = list(found.gaps)
    if not found.control:
        gaps.append("the search did not find its own canary")
    return settled(faults, f"{found}; the canary of this search was found", gaps=gaps)


def _hosts(snapshot: Snapshot) -> Iterator[tuple[str, Deployed | Verdict]]:
    if isinstance(snapshot.fleet, Wrong):
        yield "", unknown("the fleet file is not acceptable (FLT-01)")
    for host, seen in _field(snapshot).hosts.items():
        yield host, unknown(seen.why, host) if isinstance(seen, Blind) else seen


# --- cattle ---


def labels_are_complete(snapshot: Snapshot) -> Iterator[Verdict]:
    """CAT-01: what is ours is known by its labels, all of them."""
    servers = snapshot.servers
    if servers is None or isinstance(servers, Blind):
        yield unknown(servers.why if servers else "the API was not asked")
        return
    for host, server in servers.items():
        if server is None:
            yield beside("there is no such server", host)
        elif is_ours(server.labels, host):
            yield passed(f"{MANAGED_BY}={MANAGER}, {HOST_LABEL}={host}", host)
        else:
            labels = ", ".join(f"{key}={value}" for key, value in sorted(server.labels.items())) or "none"
            yield failed(f"server {server.id} has the labels: {labels}", host)


def cattle_labels_are_complete(snapshot: Snapshot) -> Iterator[Verdict]:
    """CAT-02: what lacks a label is never deleted by us, and what nobody is there to reap neither: it is paid for until
    somebody does it by hand."""
    found, idle = snapshot.cattle, _no_cattle(snapshot)
    if idle is not None and (isinstance(snapshot.fleet, Wrong) or not found):
        yield idle
        return
    if found is None or isinstance(found, Blind):
        yield unknown(found.why if found else "the API was not asked")
        return
    if idle is not None or isinstance(snapshot.fleet, Wrong):
        yield failed(some([f"{one.name} (id {one.id}) is there, and cattle is not enabled any more" for one in found]))
        return
    home = snapshot.fleet.cattle.host
    faults = [
        f"{one.name} (id {one.id}) has no proper {', '.join(lacks)}" for one in found if (lacks := missing(one.labels))
    ]
    faults += [
        f"{one.name} (id {one.id}) is of the orchestrator of {whose}, which is not cattle.host"
        for one in found
        if (whose := one.labels.get(ORCHESTRATOR, home)) != home
    ]
    off = sum(one.status == "off" for one in found)
    paid = f"; {off} of them are switched off, and are paid for" if off else ""
    yield settled(faults, f"{len(found)} cattle servers, each with the whole label set{paid}")


def cattle_key_is_limited(snapshot: Snapshot) -> Iterator[Verdict]:
    """UD-05."""
    without_cattle = _no_cattle(snapshot)
    if without_cattle is not None or isinstance(snapshot.fleet, Wrong):
        yield without_cattle or unknown("the fleet file is not acceptable (FLT-01)")
        return
    said = snapshot.fleet.cattle.tailnet
    if said.key != "static":
        yield passed(
            f"minted for each machine: ephemeral, for one use, {said.tag}, for {said.key_ttl}; what is not so is not used"
        )
        return
    age = snapshot.static_key_age_days
    if not isinstance(age, int):
        old = "how old it is cannot be seen"
    elif age > said.rotate_after_days:
        old = f"it is {age} days old, {age - said.rotate_after_days} more than rotateAfterDays: REPLACE IT NOW"
    else:
        old = f"it is {age} days old, to be replaced in {said.rotate_after_days - age}"
    yield failed(f"every machine joins with the same static key; {old}")


def _no_cattle(snapshot: Snapshot) -> Verdict | None:
    if isinstance(snapshot.fleet, Wrong):
        return unknown("the fleet file is not acceptable (FLT-01)")
    return None if snapshot.fleet.cattle.enabled else beside("cattle is not enabled in the fleet file")
