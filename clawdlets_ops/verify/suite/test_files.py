"""Secrets stay out of the store, and each is readable by its service user alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from .reading import (
    Fault,
    NotApplicable,
    Stat,
    Unknown,
    User,
    parent_faults,
    path_faults,
    read_attempts,
    section,
    settle,
    stats,
    users,
)

Observe = Callable[[str], None]

AGE_KEY = "/var/lib/sops-nix/key.txt: host age key"
ENCRYPTED = "/var/lib/clawdlets/secrets/hosts/<host>/: encrypted secrets files (sops)"
NOT_IN_STORE = "No secrets copied into /nix/store."
READABLE_STORE = "The Nix store is not a secrets vault. Design assumes store paths are widely readable on the host."
RUNTIME = "/run/secrets/**: decrypted materialized secrets at runtime (owned by service users)"
STORE = "secrets are read from /var/lib/clawdlets/secrets/hosts/<host>/<secret>.yaml"
IN_MEMORY = ("ramfs", "tmpfs")


@pytest.mark.check(
    id="FS-01",
    severity="critical",
    claim=AGE_KEY,
    expect="0400 root:root in folders of root's, and nobody else can read them",
    fix="chown root:root and chmod 0400 the key, 0700 its folder; the host must be installed again if others could read it",
)
def test_host_keys_are_private(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Owner and mode of the age key and the SSH host key, and real attempts to read them."""
    found = stats(section(facts, "files"))
    faults = [fault for wanted in expected["hostKeys"] for fault in path_faults(found, wanted)]
    faults += parent_faults(found, ("/", "/var", "/var/lib", "/etc", "/etc/ssh"))
    private = {
        wanted["path"] for wanted in expected["hostKeys"] if wanted["kind"] == "file" and wanted["mode"][-2:] == "00"
    }
    seen = settle(faults, f"{', '.join(sorted(private))}: root's alone")
    attempts = read_attempts(facts)
    tried = {path for _, path in attempts}
    if missing := sorted(private - tried):
        raise Unknown(f"nobody tried to read {missing[0]}")
    settle([f"{user} can read {path}" for (user, path), ok in attempts.items() if ok and path in private], "")
    observe(f"{seen}; {', '.join(sorted({user for user, _ in attempts}))} tried to read and could not")


@pytest.mark.check(
    id="FS-02",
    severity="high",
    claim=ENCRYPTED,
    expect="exactly the declared files, encrypted, 0400 root:root, and no other host's",
    fix="only this host's encrypted files belong there: 0400 in a folder 0700, root:root; run the payload and install stages",
)
def test_encrypted_files(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Exactly the declared files, encrypted, and no other host's."""
    found = stats(section(facts, "files"))
    folder = expected["secretsDir"]
    wanted = {secret["file"]["path"]: secret["file"] for secret in expected["secrets"]}
    faults = path_faults(found, folder)
    for one in wanted.values():
        faults += path_faults(found, one)
    faults += parent_faults(found, ("/var/lib/clawdlets",))
    shelf = folder["path"].rpartition("/")[0]
    for path, stat in found.items():
        if path.startswith(f"{shelf}/") and not path.startswith(f"{folder['path']}/") and path != folder["path"]:
            faults.append(f"{path} is another host's")
        elif path.startswith(f"{folder['path']}/") and path not in wanted:
            faults.append(f"{path} is not declared")
        elif (path == shelf or path == shelf.rpartition("/")[0]) and (stat.mode & 0o022 or stat.owner != "root"):
            faults.append(f"{path} can be changed by others")
    answers = [line.partition(" ") for line in section(facts, "encrypted").splitlines() if line]
    faults += [f"{path} is not encrypted" for answer, _, path in answers if answer != "yes"]
    seen = settle(faults, f"{len(wanted)} encrypted files in {folder['path']}, and no other")
    if missing := sorted(wanted.keys() - {path for _, _, path in answers}):
        raise Unknown(f"nobody looked into {missing[0]}")
    observe(seen)


def generations(facts: Mapping[str, Any]) -> tuple[str, dict[str, str], dict[str, Stat]]:
    """Where /run/secrets leads to, the file systems of the places that hold decrypted secrets, and what is there."""
    listing = stats(section(facts, "files"))
    if "/run/secrets" not in listing:
        raise Fault("there is no /run/secrets: no secret has been decrypted")
    text = section(facts, "secrets")
    roots: dict[str, str] = {}
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["root"] and len(words) == 3:
            roots[words[1]] = words[2]
    if not roots:
        raise Unknown("the host did not say where /run/secrets leads to")
    return next(iter(roots)), roots, stats(text, skip=("root ",))


@pytest.mark.check(
    id="FS-03",
    severity="critical",
    claim=RUNTIME,
    expect="in memory, exactly the declared secrets with the declared owner, group and mode",
    fix="hosts.<host>.secrets.<name>.owner/group/mode in fleet/clawdlets.json; then activate again",
)
def test_decrypted_secrets_belong_to_their_users(
    expected: dict[str, Any], facts: dict[str, Any], observe: Observe
) -> None:
    """In memory only, exactly the declared ones, with the declared owner, group and mode; no older generation left."""
    current, roots, found = generations(facts)
    people = users(facts)
    faults = [f"{root} is on {kind}, not in memory" for root, kind in roots.items() if kind not in IN_MEMORY]
    declared = {secret["name"]: secret for secret in expected["secrets"]}
    for secret in expected["secrets"]:
        runtime = secret["runtime"]
        path = f"{current}/{secret['name']}"
        if runtime is None:
            continue
        if runtime["group"] is None and runtime["owner"] not in people:
            faults.append(f"there is no user {runtime['owner']}, who owns {secret['name']}")
            continue
        group = runtime["group"] or people[runtime["owner"]].group
        faults += path_faults(found, {**runtime, "path": path, "group": group, "kind": "file"})
    for path, stat in found.items():
        faults += _stray_faults(path, stat, current, roots, declared)
    for path in stats(section(facts, "files")):
        if path.startswith("/run/secrets.d/") and path != current:
            faults.append(f"{path} is left of an older generation")
    wired = sum(1 for secret in expected["secrets"] if secret["runtime"])
    observe(settle(faults, f"{wired} wired secrets as declared, in {roots[current]} at {current}"))


def _stray_faults(
    path: str, stat: Stat, current: str, roots: Mapping[str, str], declared: Mapping[str, Any]
) -> list[str]:
    root = next((one for one in roots if path == one or path.startswith(f"{one}/")), current)
    if path == root:
        return (
            [f"{path} can be listed or changed by others ({stat.mode:04o})"]
            if stat.mode & 0o026 or stat.owner != "root"
            else []
        )
    if path == f"{root}/rendered" or path.startswith(f"{root}/rendered/"):
        return [f"{path} is open to everybody ({stat.mode:04o})"] if stat.mode & 0o006 else []
    secret = declared.get(path.removeprefix(f"{root}/"))
    if secret is None:
        return [f"{path} is not declared"]
    faults = []
    if not stat.kind.startswith("regular"):
        faults.append(f"{path} is a {stat.kind}")
    elif stat.mode & 0o007:
        faults.append(f"{path} is open to everybody ({stat.mode:04o})")
    elif secret["runtime"] is None and (stat.owner != "root" or stat.mode & 0o077):
        faults.append(f"{path} is for root alone, but is {stat.owner}:{stat.group} {stat.mode:04o}")
    return faults


@pytest.mark.check(
    id="FS-04",
    severity="high",
    claim=RUNTIME,
    expect="each secret opens for its own user and nobody else",
    fix="take the user out of the group that owns the secret, or declare another owner",
)
def test_only_the_service_user_can_read(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Every service user, admin and nobody really try to read every secret; owners succeed, nobody else does."""
    current, _, found = generations(facts)
    people = users(facts)
    attempts = read_attempts(facts)
    owners = {f"{current}/{secret['name']}": secret["runtime"] for secret in expected["secrets"] if secret["runtime"]}
    faults = [f"{user} can read {path}" for (user, path), ok in attempts.items() if ok and path not in owners]
    tried = 0
    for path, runtime in owners.items():
        for user in {*(one for one, _ in attempts), runtime["owner"]} - {"root"}:
            ok = attempts.get((user, path))
            may = user == runtime["owner"] or (int(runtime["mode"], 8) & 0o040 and _in_group(user, runtime, people))
            if ok is None:
                if path in found:
                    raise Unknown(f"{user} did not try to read {path}")
                faults.append(f"{path} is not there to be read by {runtime['owner']}")
            elif ok and not may:
                faults.append(f"{user} can read {path}, which belongs to {runtime['owner']}")
            elif not ok and user == runtime["owner"]:
                faults.append(f"{user} cannot read {path}, its own secret")
            tried += 1
    names = sorted({user for user, _ in attempts})
    observe(settle(faults, f"{tried} attempts by {', '.join(names)}: each secret opens for its own user alone"))


def _in_group(user: str, runtime: Mapping[str, Any], people: Mapping[str, User]) -> bool:
    owner = people.get(runtime["owner"])
    group = runtime["group"] or (owner.group if owner else None)
    return user in people and group in people[user].groups


@pytest.mark.check(
    id="STO-04",
    severity="high",
    claim=STORE,
    expect="every sopsFile is below the host's own secrets folder",
    fix='sopsFile as a string "/var/lib/clawdlets/secrets/hosts/<host>/<secret>.yaml", never a path of the flake',
)
def test_no_secret_comes_from_the_store(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """What the decryption was told to read, and that neither end of it is a link into the store."""
    folder = expected["secretsDir"]["path"]
    sources = [
        line.removeprefix("sops-file ")
        for line in section(facts, "wiring").splitlines()
        if line.startswith("sops-file ")
    ]
    faults = [f"{source} is read, expected is {folder}/…" for source in sources if not source.startswith(f"{folder}/")]
    listing = stats(section(facts, "files"))
    for secret in expected["secrets"]:
        stat = listing.get(secret["file"]["path"])
        if stat is not None and not stat.kind.startswith("regular"):
            faults.append(f"{stat.path} is a {stat.kind}")
    current, _, _ = generations(facts)
    if current.startswith("/nix/store/"):
        faults.append(f"/run/secrets leads to {current}")
    seen = settle(faults, f"{len(sources)} secrets are read from {folder}")
    if not sources:
        raise Unknown("the host has no list of what is decrypted (sops-install-secrets.service names none)")
    observe(seen)


# What a search says, line by line; any other line is a complaint of one of its programs.
_SAID_BY_SEARCH = ("control", "needles", "paths", "which", "units")


def _anywhere(_place: str) -> bool:
    return True


def _in_derivation(place: str) -> bool:
    return place.endswith(".drv")


def _in_output(place: str) -> bool:
    return not _in_derivation(place)


def leaks(
    facts: Mapping[str, Any], name: str, where: Callable[[str], bool] = _anywhere
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """What a search for known secrets says: its numbers by name, and (secret, place) of each hit in such a place. Unknown
    when it did not find its own canary; or complained and has no such hit: what could not be read was not searched."""
    numbers: dict[str, str] = {}
    hits: list[tuple[str, str]] = []
    complaints = []
    for line in section(facts, name).splitlines():
        word, _, rest = line.partition(" ")
        if word == "hit":
            secret, _, place = rest.partition(" ")
            hits += [(secret, place)] if where(place) else []
        elif word in _SAID_BY_SEARCH:
            numbers[word] = rest
        else:
            complaints.append(line)
    if complaints and not hits:
        raise Unknown(f"the search broke off, or a line is not understood: {complaints[0][:200]!r}")
    if numbers.get("control") != "found":
        raise Unknown("the search did not even find its own canary")
    return numbers, hits


def _searched(
    facts: Mapping[str, Any], where: Callable[[str], bool] = _anywhere
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    numbers, hits = leaks(facts, "store", where)
    if not numbers.get("needles", "").isdigit() or not numbers.get("paths", "").isdigit():
        raise Unknown("the host did not say how much it searched")
    return numbers, hits


def _enough(numbers: Mapping[str, str]) -> None:
    if int(numbers["needles"]) == 0:
        raise Unknown("there was no secret to look for")
    if int(numbers["paths"]) == 0:
        raise NotApplicable("there is no store path on this host but what a cache has signed")


@pytest.mark.check(
    id="STO-01",
    severity="critical",
    claim=NOT_IN_STORE,
    expect="no decrypted secret, nor its base64, in any store path that was made here; the canary is found",
    fix="use the encrypted file on the host, never builtins.readFile; nix store delete the path, replace the secret",
)
def test_no_secret_is_in_the_store(facts: dict[str, Any], observe: Observe) -> None:
    """Every decrypted secret of the host, and its base64, in the store paths that no cache has signed; the search must find a
    canary of its own first (STO-02)."""
    numbers, hits = _searched(facts, _in_output)
    faults = [f"{secret} is in {place}" for secret, place in hits]
    seen = settle(faults, f"{numbers['needles']} needles in {numbers['paths']} store paths: the canary alone was found")
    _enough(numbers)
    observe(seen)


@pytest.mark.check(
    id="STO-03",
    severity="critical",
    claim=READABLE_STORE,
    expect="no decrypted secret in any derivation",
    fix="a derivation keeps the environment it was made with: pass the secret's path, not its value; then as for STO-01",
)
def test_no_secret_is_in_a_derivation(facts: dict[str, Any], observe: Observe) -> None:
    """The same in .drv files: the output of a derivation may be clean where the derivation is not."""
    numbers, hits = _searched(facts, _in_derivation)
    faults = [f"{secret} is in {place}" for secret, place in hits]
    seen = settle(faults, f"{numbers['needles']} needles in {numbers['paths']} store paths: none is in a derivation")
    _enough(numbers)
    observe(seen)


@pytest.mark.check(
    id="STO-06",
    severity="high",
    claim=READABLE_STORE,
    expect="no decrypted secret in any unit, in the environment of PID 1, or in /etc",
    fix="EnvironmentFile= or LoadCredential= below /run/secrets, never Environment=; replace the secret",
)
def test_no_secret_is_in_a_unit(facts: dict[str, Any], observe: Observe) -> None:
    """What systemd was told of every unit, its own environment, and the files of /etc; the canary must be found."""
    numbers, hits = leaks(facts, "units")
    faults = [f"{secret} is in {place}" for secret, place in hits]
    seen = settle(faults, f"{numbers.get('units', '0')} units, PID 1 and /etc: the canary alone was found")
    if not numbers.get("units", "").isdigit() or int(numbers["units"]) == 0:
        raise Unknown("no unit was looked at")
    if _searched(facts)[0]["needles"] == "0":
        raise Unknown("there was no secret to look for")
    observe(seen)


@pytest.mark.check(
    id="FS-05",
    severity="medium",
    claim=RUNTIME,
    expect="no swap on a plain disk, no core dump, no process of a service user that may write one",
    fix="swapDevices off or encrypted; systemd.coredump off, LimitCORE=0; remove the dump, replace what its process held",
)
def test_memory_is_not_written_to_a_disk(facts: dict[str, Any], observe: Observe) -> None:
    """Swap, core dumps that lie there, and the limits of the running processes of service users: /run/secrets is in memory,
    and so is what was read from it."""
    faults, processes, pattern = [], 0, ""
    for line in section(facts, "memory").splitlines():
        word, _, rest = line.partition(" ")
        match word, rest.split():
            case "swap", [device, kind]:
                if not device.startswith(("/dev/zram", "/dev/mapper/", "/dev/dm-")):
                    faults.append(f"memory may be swapped to {device} ({kind}), which is not encrypted")
            case "coredump", [*path]:
                faults.append(f"a core dump lies at {' '.join(path)}")
            case "core", [user, process, limit]:
                processes += 1
                if limit not in ("0", "gone"):
                    faults.append(f"process {process} of {user} may write a core dump of {limit} bytes")
            case "core-pattern", [*words]:
                pattern = " ".join(words)
            case _:
                raise Unknown(f"a line is not understood: {line[:200]!r}")
    seen = settle(
        faults, f"no swap on a plain disk, no core dump; {processes} processes of service users may write none"
    )
    if not pattern:
        raise Unknown("the host did not say where core dumps go")
    observe(seen)
