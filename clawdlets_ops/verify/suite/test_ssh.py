"""SSH stays key-only; passwords for sudo and the console only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from .reading import Fault, NotApplicable, Unknown, listeners, section, settle, sshd_settings

Observe = Callable[[str], None]
Attempt = Callable[[str, str], Mapping[str, Any]]

KEY_ONLY = "SSH stays key-only; passwords for sudo/console only."
MUST_BE_NO = (
    "passwordauthentication",
    "kbdinteractiveauthentication",
    "hostbasedauthentication",
    "gssapiauthentication",
    "permitemptypasswords",
)
WEAK = re.compile(r"cbc|3des|arcfour|blowfish|cast128|md5|sha1|ripemd|umac-64|group1-")
REMOTE_SHELLS = (
    "sshd",
    "dropbear",
    "telnetd",
    "in.telnetd",
    "rlogind",
    "in.rlogind",
    "rshd",
    "in.rshd",
    "inetd",
    "xinetd",
)


def effective_settings(
    expected: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[tuple[str, str], dict[str, list[str]]]:
    """The settings for every user and source address that must have been asked for; Unknown when one is missing."""
    found = sshd_settings(facts)
    wanted = {(user, source) for user in expected["sshdUsers"] for source in expected["sshdSources"]}
    if missing := sorted(wanted - found.keys()):
        raise Unknown(f"sshd -T was not asked for {missing[0][0]} from {missing[0][1]}")
    return found


@pytest.mark.check(
    id="SSH-01",
    severity="critical",
    claim=KEY_ONLY,
    expect="passwords, keyboard-interactive, hostbased, GSSAPI and empty passwords no; public keys yes",
    fix="services.openssh.settings: no passwords, no keyboard-interactive, and no Match block that says otherwise",
)
def test_effective_configuration_is_key_only(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Asked of sshd itself for each user and source, because a Match block shows only there."""
    settings = effective_settings(expected, facts)
    faults = []
    for (user, source), values in settings.items():
        where = f"for {user} from {source}"
        for keyword in MUST_BE_NO:
            if (value := values.get(keyword, [])) != ["no"] and (value or keyword == "passwordauthentication"):
                faults.append(f"{keyword} {' '.join(value) or 'unset'} {where}")
        if values.get("pubkeyauthentication") != ["yes"]:
            faults.append(f"pubkeyauthentication is not yes {where}")
        methods = " ".join(values.get("authenticationmethods", ["any"]))
        if methods not in ("any", "publickey"):
            faults.append(f"authenticationmethods {methods} {where}")
    observe(settle(faults, f"sshd -T: only public keys, for {len(settings)} pairs of user and source"))


@pytest.mark.check(
    id="SSH-02",
    severity="high",
    claim=KEY_ONLY,
    expect="the program of the unit runs, started after its configuration was last changed",
    fix="systemctl restart sshd: the daemon does not run what its configuration says",
)
def test_the_running_daemon_has_read_its_configuration(facts: dict[str, Any], observe: Observe) -> None:
    """Best effort: what SSH-03 sees of the daemon decides."""
    known: dict[str, str] = {}
    files: list[tuple[int, str]] = []
    for line in section(facts, "sshd-unit").splitlines():
        word, _, rest = line.partition(" ")
        if word == "config-file":
            when, _, path = rest.partition(" ")
            files.append((_number(when, line), path))
        else:
            known[word] = rest
    if missing := {"running-program", "unit-program", "started", "need-reload"} - known.keys():
        raise Unknown(f"the host did not say: {', '.join(sorted(missing))}")
    if not files:
        raise Unknown("the daemon's configuration file was not found")
    started = _number(known["started"], "started")
    faults = []
    if known["need-reload"] != "no":
        faults.append("systemd has an older unit file loaded than the one on disk")
    if known["running-program"] != known["unit-program"]:
        faults.append(f"{known['running-program']} runs, the unit names {known['unit-program']}")
    # Files in the store all have the same time stamp, which says nothing.
    changed = [path for when, path in files if not path.startswith("/nix/store/") and when > started]
    faults += [f"{path} was changed after the daemon started" for path in changed]
    seen = settle(faults, "sshd was started after its configuration was last changed")
    in_store = any(path.startswith("/nix/store/") for _, path in files)
    if in_store and started < _number(known.get("activated", ""), "activated"):
        raise Unknown(
            "sshd was started before the last activation, and a file of the store does not tell when it changed"
        )
    observe(seen)


@pytest.mark.check(
    id="SSH-05",
    severity="high",
    claim=KEY_ONLY,
    expect="permitrootlogin no, allowusers admin, and root with a good key is refused",
    fix="PermitRootLogin no and AllowUsers with the admin user alone",
)
def test_root_cannot_log_in(
    expected: dict[str, Any], facts: dict[str, Any], attempt: Attempt, observe: Observe
) -> None:
    """By configuration, and by trying with a key that is good for the admin user."""
    admin = expected["ssh"]["user"]
    faults = []
    for (user, source), values in effective_settings(expected, facts).items():
        if values.get("permitrootlogin") != ["no"]:
            faults.append(
                f"permitrootlogin {' '.join(values.get('permitrootlogin', ['unset']))} for {user} from {source}"
            )
        allowed = {pattern for line in values.get("allowusers", []) for pattern in line.split()}
        if not allowed:
            faults.append(f"allowusers is not set for {user} from {source}")
        elif allowed != {admin}:
            faults.append(f"allowusers {' '.join(sorted(allowed))} for {user} from {source}")
    seen = settle(faults, f"permitrootlogin no, allowusers {admin}")
    tried = attempt("root", "publickey")
    if tried["result"] == "admitted":
        raise Fault("root was let in with the admin's key")
    if tried["result"] != "denied":
        raise Unknown(f"the attempt to log in as root came to nothing: {tried['why']}")
    observe(f"{seen}; root with a good key was refused")


@pytest.mark.check(
    id="SSH-06",
    severity="critical",
    claim=KEY_ONLY,
    expect="the declared keys for admin, and no other key, command or CA for anybody",
    fix="remove keys that fleet/clawdlets.json does not declare; AuthorizedKeysFile /etc/ssh/authorized_keys.d/%u alone",
)
def test_only_declared_keys(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Every file that sshd would read, for every user of the host."""
    faults = []
    for (user, source), values in effective_settings(expected, facts).items():
        for keyword in ("authorizedkeyscommand", "trustedusercakeys"):
            if values.get(keyword, ["none"]) != ["none"]:
                faults.append(f"{keyword} {' '.join(values[keyword])} for {user} from {source}")
    counts: dict[tuple[str, str], int] = {}
    keys: dict[tuple[str, str], list[str]] = {}
    for line in section(facts, "authorized-keys").splitlines():
        words = line.split()
        if len(words) < 5 or words[0] not in ("file", "key") or words[1] not in ("effective", "ignored"):
            if line:
                raise Unknown(f"a line about authorized keys is not understood: {line[:200]!r}")
        elif words[1] == "effective" and words[0] == "file":
            counts[words[2], words[3]] = _number(words[4], line)
        elif words[1] == "effective":
            keys.setdefault((words[2], words[3]), []).append(words[4])
    for (user, path), count in counts.items():
        if len(keys.get((user, path), [])) != count:
            faults.append(f"{path} has {count} lines, of which {len(keys.get((user, path), []))} are keys")
    declared = {key["fingerprint"] for key in expected["adminKeys"]}
    admin = expected["ssh"]["user"]
    for (user, path), found in keys.items():
        strangers = set(found) if user != admin else set(found) - declared
        faults += [f"{path} lets {one} in as {user}, which is not declared" for one in sorted(strangers)]
    present = {one for (user, _), found in keys.items() if user == admin for one in found}
    faults += [f"the declared key {one} is not on the host" for one in sorted(declared - present)]
    observe(settle(faults, f"{len(declared)} declared keys for {admin}, no other key for anybody"))


@pytest.mark.check(
    id="SSH-07",
    severity="high",
    claim=KEY_ONLY,
    expect="one sshd on one port, no other remote shell, Tailscale SSH off",
    fix="one sshd on one port; no other remote shell; tailscale set --ssh=false",
)
def test_no_second_door(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """No other program that lets people in, and no Tailscale SSH, which passes sshd by."""
    port = expected["ssh"]["port"]
    faults, doors = [], 0
    for one in listeners(facts):
        if one.port == port and not one.programs:
            raise Unknown(f"ss does not say who listens on {one.address}:{port}")
        for program in one.programs:
            if program == "sshd" and one.port == port:
                doors += 1
            elif program in REMOTE_SHELLS or one.port == port:
                faults.append(f"{program} listens on {one.address}:{one.port}")
    prefs = section(facts, "tailscale").strip()
    if prefs != "absent" and "false" not in prefs:
        faults.append("Tailscale SSH is on")
    seen = settle(faults, f"sshd on port {port} is the only remote shell")
    if not doors:
        raise Unknown(f"sshd was not seen on port {port}, so the list of listeners proves nothing")
    observe(seen + ("; no tailscale program here" if prefs == "absent" else "; Tailscale SSH is off"))


@pytest.mark.check(
    id="SSH-08",
    severity="high",
    claim="SSH stays key-only; passwords for sudo/console only.",
    expect="admin and breakglass alone have a password (yescrypt); NOPASSWD for exact commands only",
    fix="users.mutableUsers = false; passwords for admin and breakglass alone; NOPASSWD for exact commands only",
)
def test_passwords_and_sudo(expected: dict[str, Any], facts: dict[str, Any], observe: Observe) -> None:
    """Which accounts have a password at all, and what admin may do without one."""
    faults = []
    classes: dict[str, str] = {}
    for line in section(facts, "shadow").splitlines():
        words = line.split()
        if len(words) != 2:
            raise Unknown("a line about passwords is not understood")
        classes[words[0]] = words[1]
    if "root" not in classes:
        raise Unknown("the list of passwords does not even have root")
    for user, kind in classes.items():
        if kind == "none":
            faults.append(f"{user} needs no password at all")
        elif kind != "locked" and user not in expected["passwordUsers"]:
            faults.append(f"{user} has a password ({kind})")
        elif kind not in ("locked", "yescrypt"):
            faults.append(f"the password of {user} is hashed with {kind}, expected yescrypt")
    commands = passwordless(section(facts, "sudo"))
    for command in commands:
        if fault := sudo_fault(command, own=expected["sudo"]["ownPrograms"]):
            faults.append(f"sudo without a password: {command}: {fault}")
    with_password = sorted(user for user, kind in classes.items() if kind != "locked")
    observe(
        settle(faults, f"passwords: {', '.join(with_password) or 'none'}; {len(commands)} exact commands without one")
    )


def passwordless(listing: str) -> list[str]:
    """The commands that need no password, from the output of ``sudo -l -U``. Unknown when it is not understood."""
    head, found, body = listing.partition("may run the following commands")
    if not found:
        if "is not allowed to run sudo" in listing:
            return []
        raise Unknown(f"sudo's answer is not understood: {listing.strip()[:200]!r}")
    commands = ["ALL (Defaults !authenticate)"] if "!authenticate" in head else []
    entries: list[str] = []
    for line in body.splitlines()[1:]:
        if line.lstrip().startswith("("):
            entries.append(line.strip())
        elif line.strip() and entries:
            entries[-1] += f" {line.strip()}"
    for entry in entries:
        free = False
        for part in re.split(r"(?<!\\),\s+", re.sub(r"^\([^)]*\)\s*", "", entry)):
            command = part.strip()
            while tag := re.match(r"([A-Z_]+):\s*", command):
                free = {"NOPASSWD": True, "PASSWD": False}.get(tag[1], free)
                command = command[tag.end() :]
            if free:
                commands.append(command)
    return commands


def sudo_fault(command: str, *, own: str) -> str | None:
    """Why ``command`` must not be allowed without a password, or None. ``own`` begins the paths of our own programs, which
    check their arguments themselves."""
    program, _, arguments = command.partition(" ")
    if program == "ALL":
        return "everything"
    if not program.startswith("/") or program.endswith("/"):
        return "names no single program"
    if re.search(r"[*?\[\]^]", program):
        return "has a wildcard"
    if not arguments:
        return None if program.startswith(own) else "takes any arguments"
    if arguments.startswith("^") and arguments.endswith("$"):
        return "has an open-ended pattern" if re.search(r"(?<!\\)[.*+]|\{\d+,\}", arguments) else None
    return "has a wildcard" if re.search(r"[*?\[\]]", arguments) else None


@pytest.mark.check(
    id="SSH-09",
    severity="high",
    claim=KEY_ONLY,
    expect="the pinned key is the one shown to clients and the only one on the host",
    fix="somebody else may be answering, or the host was rebuilt: find out before you trust it; then install again",
)
def test_host_identity_is_pinned(
    expected: dict[str, Any], facts: dict[str, Any], attempt: Attempt, observe: Observe
) -> None:
    """The key in the repository, the key that a client is shown, and the key file on the host are one."""
    pin = expected["ssh"]["pinFingerprint"]
    presented = attempt(expected["ssh"]["user"], "none")["presented"]
    if presented and presented != pin:
        raise Fault(f"{expected['ssh']['address']} shows the host key {presented}, pinned is {pin}")
    on_host = dict(line.split()[:2] for line in section(facts, "host-keys").splitlines() if len(line.split()) >= 2)
    if not on_host:
        raise Unknown("the host named no host key")
    faults = [f"{path} is {one}, pinned is {pin}" for path, one in on_host.items() if one != pin]
    seen = settle(faults, f"{pin}: pinned, shown to clients, and the only host key on the host")
    if not presented:
        raise Unknown("no host key was shown to the client")
    observe(seen)


@pytest.mark.check(
    id="SSH-10",
    severity="low",
    claim=KEY_ONLY,
    expect="no CBC, SHA-1, MD5 or 64-bit tags are offered",
    fix="services.openssh.settings: Ciphers, Macs and KexAlgorithms without CBC, SHA-1, MD5 and 64-bit tags",
)
def test_no_weak_algorithms(facts: dict[str, Any], observe: Observe) -> None:
    """The ciphers, MACs and key exchanges that sshd would agree to."""
    found = dict(line.split(maxsplit=1) for line in section(facts, "sshd-crypto").splitlines() if " " in line)
    if missing := {"ciphers", "macs", "kexalgorithms"} - found.keys():
        raise Unknown(f"sshd -T did not say: {', '.join(sorted(missing))}")
    offered = {kind: names.split(",") for kind, names in found.items()}
    faults = [f"{kind}: {name}" for kind, names in sorted(offered.items()) for name in names if WEAK.search(name)]
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in sorted(offered.items()))
    observe(settle(faults, f"none is weak: {counts}"))


@pytest.mark.check(
    id="SSH-03",
    severity="critical",
    claim=KEY_ONLY,
    expect="publickey and nothing else",
    fix="the running sshd offers more than keys: restart it, then look at SSH-01",
    vantage="client",
)
def test_a_client_is_offered_keys_only(expected: dict[str, Any], attempt: Attempt, observe: Observe) -> None:
    """What the daemon says to a client that offers nothing."""
    _offers_keys_only(attempt(expected["ssh"]["user"], "none"), expected["ssh"]["user"], observe)


@pytest.mark.check(
    id="SSH-04",
    severity="critical",
    claim=KEY_ONLY,
    expect="publickey and nothing else, for a client that wants to send a password",
    fix="the running sshd takes passwords: restart it, then look at SSH-01",
    vantage="client",
)
def test_a_password_is_refused(expected: dict[str, Any], attempt: Attempt, observe: Observe) -> None:
    """A client that wants to use a password, as the user who has one."""
    users = [user for user in expected["passwordUsers"] if user != expected["ssh"]["user"]]
    if not users:
        raise NotApplicable("no user but admin has a password")
    _offers_keys_only(attempt(users[0], "password"), users[0], observe)


def _offers_keys_only(tried: Mapping[str, Any], user: str, observe: Observe) -> None:
    if tried["result"] == "admitted":
        raise Fault(f"{user} was let in without a key")
    if tried["methods"] is None:
        raise Unknown(f"the attempt came to nothing: {tried['why']}")
    if tried["methods"] != ["publickey"]:
        raise Fault(f"{user} is offered {', '.join(tried['methods'])}")
    observe(f"{user} is offered publickey and nothing else")


def _number(text: str, what: str) -> int:
    if not text.isdigit():
        raise Unknown(f"not a number: {what[:200]!r}")
    return int(text)
