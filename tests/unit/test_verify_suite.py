"""The check catalogue against a host that is as it should be, and against one seeded fault each."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest

from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.tailnet import Peer
from clawdlets_ops.vantage import Vantage
from clawdlets_ops.verify.expectation import OFTEN_OPEN, build_expectation, fingerprint
from clawdlets_ops.verify.suite.reading import Fault, NotApplicable, Unknown, parse_frames

PIN = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE1vY2tIb3N0S2V5Rm9yVGVzdHNPbmx5MDAwMDAwMDAw"
ADMIN_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE1vY2tBZG1pbktleUZvclRlc3RzT25seTAwMDAwMDAw maren"
OTHER_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE1vY2tPdGhlcktleUZvclRlc3RzT25seTAwMDAwMDAw eve"
PUBLIC = {4: "198.18.7.10", 6: "2001:2:0:70a::1"}
TAILNET = {4: "100.64.7.10", 6: "fd7a:115c:a1e0:7::a"}
CONTROLS = {4: ("198.19.7.3", 4242), 6: ("2001:2:0:700::3", 4242)}
VANTAGES = (
    Vantage("operator", "internet", controls=CONTROLS),
    Vantage("stranger", "internet", ("ip", "netns", "exec", "outside"), CONTROLS),
    Vantage("member", "tailnet", ("ip", "netns", "exec", "member"), {4: ("100.64.7.3", 4242)}),
)
FLEET = {
    "schemaVersion": 1,
    "hosts": {
        "alpha": {
            "provisioning": {"adminCidrs": ["198.18.0.0/24", "2001:2::/64"]},
            "sshAuthorizedKeys": [ADMIN_KEY],
            "secrets": {
                "discord_token": {"owner": "bot-maren"},
                "shared": {"owner": "bot-maren", "group": "bots", "mode": "0440"},
            },
        }
    },
}
SUITE = ("test_ssh", "test_exposure", "test_network", "test_files", "test_repository")
IDS = {
    *(f"SSH-{number:02}" for number in range(1, 11)),
    *(f"EXP-0{number}" for number in range(1, 8)),
    *(
        "EXP-09",
        "EXP-10",
        "EXP-11",
        "TS-01",
        "TS-02",
        "TS-03",
        "UDP-01",
        "EGR-01",
        "EGR-02",
        "EGR-03",
        "UD-04",
        "CLK-01",
    ),
    *("FS-01", "FS-02", "FS-03", "FS-04", "FS-05", "STO-01", "STO-03", "STO-04", "STO-06"),
}
REPOSITORY = {
    *(f"GIT-0{number}" for number in range(1, 7)),
    *(f"SOP-0{number}" for number in (1, 2, 3, 4, 5, 7)),
    *("KEY-02", "RTD-01", "RTD-02", "RTD-03", "RTD-05", "DRF-02", "STO-05", "STO-07", "EXP-08"),
    *("SUP-01", "SUP-02", "SUP-03", "SUP-05"),
}
IDS |= REPOSITORY
AS_OF = "2026-11-22T10:00:00+00:00"

SECRETS = ["admin_password_hash", "breakglass_password_hash", "discord_token", "shared", "tailscale_auth_key"]
ENCRYPTED = "/var/lib/clawdlets/secrets/hosts/alpha"
NOW = "/run/secrets.d/3"
READERS = {f"{NOW}/discord_token": {"bot-maren"}, f"{NOW}/shared": {"bot-maren", "bot-otto"}}
PRIVATE = [
    "/var/lib/sops-nix/key.txt",
    "/etc/ssh/ssh_host_ed25519_key",
    *(f"{ENCRYPTED}/{name}.yaml" for name in SECRETS),
]

World = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def marker(pytestconfig: pytest.Config) -> None:
    """The suite's marker, which its own plugin registers; the suite is imported after this."""
    pytestconfig.addinivalue_line(
        "markers", "check(id, severity, claim, expect, fix, vantage): the entry of the check catalogue"
    )


def suite_module(name: str) -> Any:
    return importlib.import_module(f"clawdlets_ops.verify.suite.{name}")


def make_expected(mode: str = "tailnet", **changes: Any) -> dict[str, Any]:
    fleet = copy.deepcopy(FLEET)
    fleet["hosts"]["alpha"].update(changes)
    rules = [{"direction": "in", "protocol": "udp", "port": "41641", "sourceIps": ["0.0.0.0/0", "::/0"]}]
    if mode != "tailnet":
        rules.append(
            {"direction": "in", "protocol": "tcp", "port": "22", "sourceIps": ["198.18.0.0/24", "2001:2::/64"]}
        )
    expected = build_expectation(
        host="alpha",
        declared=parse_fleet(json.dumps(fleet)).host("alpha"),
        mode=mode,
        public=PUBLIC,
        tailnet=TAILNET,
        pin=PIN,
        admin_keys=(ADMIN_KEY,),
        identity_file="/nowhere/key",
        vantages=VANTAGES,
        node=Peer("alpha", TAILNET, online=True),
        cloud={
            "server": {"name": "alpha", "status": "running", "labels": {}, "privateAddresses": []},
            "firewalls": [{"name": "alpha-edge", "status": "applied", "rules": rules}],
        },
    )
    return {**expected, "asOf": AS_OF}


def nft_rule(chain: str, *expr: Any) -> dict[str, Any]:
    return {"rule": {"family": "inet", "table": "clawdlets", "chain": chain, "handle": 1, "expr": list(expr)}}


def match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


IIF, OIF = {"meta": {"key": "iifname"}}, {"meta": {"key": "oifname"}}
DPORT = {"payload": {"protocol": "tcp", "field": "dport"}}
ACCEPT, DROP, COUNTER = {"accept": None}, {"drop": None}, {"counter": {"packets": 0, "bytes": 0}}
MAIL = {"set": [25, 465, 587, 2525]}


def base_chain(name: str, policy: str, family: str = "inet") -> dict[str, Any]:
    return {
        "chain": {
            "family": family, "table": "clawdlets", "name": name, "type": "filter", "hook": name, "prio": 0, "policy": policy,
        }
    }  # fmt: skip


def good_ruleset() -> list[dict[str, Any]]:
    return [
        {"metainfo": {"json_schema_version": 1}},
        {"table": {"family": "inet", "name": "clawdlets"}},
        base_chain("input", "drop"),
        base_chain("output", "accept"),
        base_chain("forward", "accept"),
        nft_rule("input", match(IIF, "lo"), ACCEPT),
        nft_rule("input", match({"ct": {"key": "state"}}, ["established", "related"], "in"), ACCEPT),
        nft_rule("input", match({"meta": {"key": "l4proto"}}, {"set": ["icmp", "ipv6-icmp"]}), ACCEPT),
        nft_rule("input", match(IIF, "tailscale0"), match(DPORT, 22), ACCEPT),
        nft_rule("forward", match(DPORT, MAIL), COUNTER, DROP),
        nft_rule("output", match(OIF, "lo"), ACCEPT),
        nft_rule("output", match(DPORT, MAIL), COUNTER, DROP),
    ]


SSHD = """passwordauthentication no
kbdinteractiveauthentication no
hostbasedauthentication no
gssapiauthentication no
permitemptypasswords no
pubkeyauthentication yes
authenticationmethods publickey
permitrootlogin no
allowusers admin
authorizedkeysfile /etc/ssh/authorized_keys.d/%u
authorizedkeyscommand none
trustedusercakeys none
hostkey /etc/ssh/ssh_host_ed25519_key"""


def mail_out(*users: str) -> str:
    """Every attempt dropped, of these users' (root and bot-maren when none are named)."""
    return "\n".join(
        f"{user} {address} {port} dropped"
        for address in ("192.0.2.1", "2001:db8::1")
        for user in users or ("root", "bot-maren")
        for port in MAIL["set"]
    )


def good_sections(mode: str = "tailnet") -> dict[str, str]:
    expected = make_expected()
    pairs = [(user, source) for user in expected["sshdUsers"] for source in expected["sshdSources"]]
    files = [
        *(
            f"755 root root directory 4096 {path}"
            for path in ("/", "/var", "/var/lib", "/var/lib/clawdlets", "/run", "/etc", "/etc/ssh")
        ),
        "700 root root directory 4096 /var/lib/sops-nix",
        "400 root root regular file 189 /var/lib/sops-nix/key.txt",
        "777 root root symbolic link 16 /run/secrets",
        "751 root root directory 0 /run/secrets.d",
        "751 root root directory 0 /run/secrets.d/3",
        "755 root root directory 4096 /var/lib/clawdlets/secrets",
        "755 root root directory 4096 /var/lib/clawdlets/secrets/hosts",
        f"700 root root directory 4096 {ENCRYPTED}",
        *(f"400 root root regular file 900 {ENCRYPTED}/{name}.yaml" for name in SECRETS),
        "600 root root regular file 399 /etc/ssh/ssh_host_ed25519_key",
        "644 root root regular file 89 /etc/ssh/ssh_host_ed25519_key.pub",
        "absent /run/clf",
    ]
    isolation = []
    for user in ("bot-maren", "bot-otto", "admin", "nobody"):
        isolation.append(f"{user} control ok")
        for path in (*PRIVATE, *(f"{NOW}/{name}" for name in SECRETS)):
            isolation.append(f"{user} {path} {'ok' if user in READERS.get(path, ()) else 'denied'}")
    return {
        "os-release": "ID=nixos",
        "sshd-unit": "unit ssh.service\npid 88\nprogram /usr/sbin/sshd\nconfig /etc/ssh/sshd_config\n"
        "config-file 1700000000 /etc/ssh/sshd_config\nrunning-program /usr/sbin/sshd\nunit-program /usr/sbin/sshd\n"
        "started 1700000100\nneed-reload no\nactivated 1700000050",
        "sshd-config": "\n".join(f"{user} {source} {line}" for user, source in pairs for line in SSHD.splitlines()),
        "host-keys": f"/etc/ssh/ssh_host_ed25519_key {fingerprint(PIN)} (ED25519)",
        "authorized-keys": "file effective admin /etc/ssh/authorized_keys.d/admin 1\n"
        f"key effective admin /etc/ssh/authorized_keys.d/admin {fingerprint(ADMIN_KEY)} (ED25519)\n"
        "file ignored root /root/.ssh/authorized_keys 1\n"
        f"key ignored root /root/.ssh/authorized_keys {fingerprint(OTHER_KEY)} (ED25519)",
        "users": "user:root:0:0:/root:/bin/sh\nuser:admin:1000:1000:/home/admin:/bin/sh\nuser:bot-maren:998:998::/nologin\n"
        "user:bot-otto:997:997::/nologin\nuser:nobody:65534:65534::/nologin\ngroup:root:0:\ngroup:admin:1000:\n"
        "group:bot-maren:998:\ngroup:bot-otto:997:\ngroup:nogroup:65534:\ngroup:bots:900:bot-otto",
        "shadow": "root locked\nadmin yescrypt\nbreakglass yescrypt\nbot-maren locked\nbot-otto locked",
        "sudo": SUDO,
        "listen-tcp": 'LISTEN 0 128 0.0.0.0:22 0.0.0.0:* users:(("sshd",pid=88,fd=3))\n'
        'LISTEN 0 128 [::]:22 [::]:* users:(("sshd",pid=88,fd=4))\n'
        'LISTEN 0 64 127.0.0.1:3128 0.0.0.0:* users:(("squid",pid=9,fd=3))',
        "sshd-crypto": "ciphers aes256-gcm@openssh.com,aes128-ctr\nmacs hmac-sha2-256-etm@openssh.com\nkexalgorithms curve25519-sha256",
        "listen-udp": "",
        "survivors": "100.64.7.10:22 100.64.7.1:40022\n[fd7a:115c:a1e0:7::a]:22 [fd7a:115c:a1e0:7::1]:40024",
        "tailscale-self": "absent",
        "metadata": "admin closed\nbot-maren closed\nbot-otto closed\nnobody closed\nroot open",
        "mail-out": mail_out(),
        "nft": json.dumps({"nftables": good_ruleset()}),
        "tailscale": "absent",
        "files": "\n".join(files),
        "secrets": f"root {NOW} ramfs\n751 root root directory 0 {NOW}\n"
        f"400 bot-maren bot-maren regular file 70 {NOW}/discord_token\n440 bot-maren bots regular file 70 {NOW}/shared\n"
        + "\n".join(f"400 root root regular file 70 {NOW}/{name}" for name in SECRETS if name not in ("discord_token", "shared")),
        "encrypted": "\n".join(f"yes {ENCRYPTED}/{name}.yaml" for name in SECRETS),
        "wiring": "manifest /var/lib/clawdlets/secrets-wiring.json\n"
        + "\n".join(f"sops-file {ENCRYPTED}/{name}.yaml" for name in SECRETS),
        "isolation": "\n".join(isolation),
        "clock": "1764064801",
        "store": "which made here\nneedles 6\npaths 12\ncontrol found",
        "units": "units 80\ncontrol found",
        "memory": "core bot-maren 311 0\ncore-pattern core",
        "exposure": "tailnet",
        "exposure-now": f"mode={mode} armed=no",
        "system": "running",
    }  # fmt: skip


SUDO = """Matching Defaults entries for admin on alpha:
    env_reset, mail_badpass, use_pty, !lecture

User admin may run the following commands on alpha:
    (ALL : ALL) ALL
    (root) NOPASSWD: /run/current-system/sw/bin/clawdlets-facts ^[0-9a-f]{32}$, /run/current-system/sw/bin/clawdlets-exposure status,
        /run/current-system/sw/bin/clawdlets-exposure try tailnet"""


def good_exposure(mode: str = "tailnet") -> list[dict[str, Any]]:
    cells = []
    for vantage in VANTAGES:
        inside = vantage.side == "tailnet"
        for family in (4, 6):
            reach = "yes" if inside or (mode == "public" and vantage.name == "operator") else "no"
            cells.append(
                {
                    "vantage": vantage.name,
                    "side": vantage.side,
                    "family": family,
                    "address": (TAILNET if inside else PUBLIC)[family],
                    "port": 22,
                    "reach": reach,
                    "detail": "open" if reach == "yes" else "filtered",
                }
            )
    closed = [
        {**cell, "port": port, "reach": "no", "detail": "filtered"}
        for cell in cells
        for port in OFTEN_OPEN
        if cell["side"] == "internet"
    ]
    return [*cells, *closed]


def good_attempts() -> dict[tuple[str, str], dict[str, Any]]:
    refused = {
        "result": "denied",
        "methods": ["publickey"],
        "presented": fingerprint(PIN),
        "why": "Permission denied (publickey).",
    }
    return {
        ("admin", "none"): dict(refused),
        ("breakglass", "password"): dict(refused),
        ("root", "publickey"): dict(refused),
    }


def good_world(mode: str = "tailnet", **changes: Any) -> World:
    sections = {name: {"status": 0, "text": text} for name, text in good_sections(mode).items()}
    return {
        "expected": make_expected(mode, **changes),
        "facts": {
            "problem": None,
            "network": "tailnet" if mode == "tailnet" else "public",
            "address": TAILNET[4],
            "asked": {"from": 1764064800.0, "to": 1764064802.5},
            "sections": sections,
        },
        "exposure": good_exposure(mode),
        "attempts": good_attempts(),
        "repository": {
            "problem": None,
            "findings": [
                doctor_says(ident, "pass", "alpha" if ident in ("RTD-02", "EXP-08") else "")
                for ident in sorted(REPOSITORY)
            ],
        },
    }


def doctor_says(ident: str, state: str, host: str = "") -> dict[str, str]:
    return {"check": ident, "state": state, "host": host, "observed": f"{ident} is {state}", "fix": ""}


def run_suite(world: World) -> dict[str, tuple[str, str]]:
    """Every check of the catalogue on ``world``: id → (state, text)."""
    results = {}
    for module in SUITE:
        for name, function in inspect.getmembers(suite_module(module), inspect.isfunction):
            if not name.startswith("test_"):
                continue
            seen: list[str] = []
            given = {
                "expected": world["expected"],
                "facts": world["facts"],
                "exposure": world["exposure"],
                "attempt": lambda user, method: world["attempts"][user, method],
                "repository": world["repository"],
                "cloud": world["expected"]["cloud"],
                "observe": seen.append,
            }
            check = next(mark for mark in function.pytestmark if mark.name == "check").kwargs["id"]
            assert check not in results, f"{check} is there twice"
            try:
                function(**{argument: given[argument] for argument in inspect.signature(function).parameters})
                results[check] = ("pass", "; ".join(seen))
                assert seen, f"{check} passes without saying what it saw"
            except Fault as error:
                results[check] = ("fail", str(error))
            except Unknown as error:
                results[check] = ("unknown", str(error))
            except NotApplicable as error:
                results[check] = ("not-applicable", str(error))
    return results


def with_state(results: dict[str, tuple[str, str]], *states: str) -> set[str]:
    return {check for check, (state, _) in results.items() if state in states}


def edit(world: World, name: str, old: str, new: str) -> None:
    part = world["facts"]["sections"][name]
    assert old in part["text"], f"{old!r} is not in {name}"
    part["text"] = part["text"].replace(old, new)


def edit_rules(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[World], None]:
    def seed(world: World) -> None:
        objects = good_ruleset()
        change(objects)
        world["facts"]["sections"]["nft"]["text"] = json.dumps({"nftables": objects})

    return seed


def text_edit(name: str, old: str, new: str) -> Callable[[World], None]:
    return lambda world: edit(world, name, old, new)


def appended(name: str, line: str) -> Callable[[World], None]:
    def seed(world: World) -> None:
        world["facts"]["sections"][name]["text"] += f"\n{line}"

    return seed


def tried_by(user: str) -> Callable[[World], None]:
    """Mail was tried by that user alone, on a host that has a bot."""

    def seed(world: World) -> None:
        world["expected"]["egress"]["bots"].append({"user": "bot-maren", "mode": "smtp-only"})
        world["facts"]["sections"]["mail-out"]["text"] = mail_out(user)

    return seed


def cloud_rule(**rule: Any) -> Callable[[World], None]:
    return lambda world: world["expected"]["cloud"]["firewalls"][0]["rules"].append({"direction": "in", **rule})


def cell(vantage: str, family: int, reach: str, port: int = 22) -> Callable[[World], None]:
    def seed(world: World) -> None:
        wanted = (vantage, family, port)
        one = next(one for one in world["exposure"] if (one["vantage"], one["family"], one["port"]) == wanted)
        one.update(reach=reach, detail="seeded")

    return seed


def attempted(user: str, method: str, **answer: Any) -> Callable[[World], None]:
    return lambda world: world["attempts"][user, method].update(answer)


def doctor(ident: str, state: str, host: str = "") -> Callable[[World], None]:
    return lambda world: world["repository"]["findings"].append(doctor_says(ident, state, host))


def v4_only(objects: list[dict[str, Any]]) -> None:
    for item in objects:
        for kind in ("chain", "rule"):
            if kind in item:
                item[kind]["family"] = "ip"


def no_mail_rule_on_v6(objects: list[dict[str, Any]]) -> None:
    for item in objects:
        if ("rule" in item and item["rule"]["chain"] == "output") or item.get("chain", {}).get("name") == "output":
            next(iter(item.values()))["family"] = "ip"


def without_counter(objects: list[dict[str, Any]]) -> None:
    objects[-1]["rule"]["expr"].remove(COUNTER)


FAULTS: list[tuple[str, str, Callable[[World], None]]] = [
    ("SSH-01", "a Match block", text_edit("sshd-config", "root 127.0.0.1 passwordauthentication no", "root 127.0.0.1 passwordauthentication yes")),
    ("SSH-01", "keyboard-interactive", text_edit("sshd-config", "admin 2001:db8::9 kbdinteractiveauthentication no", "admin 2001:db8::9 kbdinteractiveauthentication yes")),
    ("SSH-01", "no public keys", text_edit("sshd-config", "pubkeyauthentication yes", "pubkeyauthentication no")),
    ("SSH-01", "methods", text_edit("sshd-config", "admin 203.0.113.9 authenticationmethods publickey", "admin 203.0.113.9 authenticationmethods publickey password")),
    ("SSH-02", "edited after the start", text_edit("sshd-unit", "config-file 1700000000", "config-file 1700000101")),
    ("SSH-02", "other program", text_edit("sshd-unit", "running-program /usr/sbin/sshd", "running-program /usr/sbin/sshd (deleted)")),
    ("SSH-02", "old unit", text_edit("sshd-unit", "need-reload no", "need-reload yes")),
    ("SSH-03", "offers passwords", attempted("admin", "none", methods=["password", "publickey"])),
    ("SSH-04", "offers passwords", attempted("breakglass", "password", methods=["password", "publickey"])),
    ("SSH-04", "lets in", attempted("breakglass", "password", result="admitted", methods=["publickey"])),
    ("SSH-05", "root by key", text_edit("sshd-config", "permitrootlogin no", "permitrootlogin prohibit-password")),
    ("SSH-05", "everybody", text_edit("sshd-config", "allowusers admin", "allowusers admin breakglass")),
    ("SSH-05", "root let in", attempted("root", "publickey", result="admitted")),
    ("SSH-06", "a stranger's key", appended("authorized-keys", f"file effective root /root/.ssh/authorized_keys 1\nkey effective root /root/.ssh/authorized_keys {fingerprint(OTHER_KEY)} (ED25519)")),
    ("SSH-06", "one key more", text_edit("authorized-keys", "file effective admin /etc/ssh/authorized_keys.d/admin 1", f"file effective admin /etc/ssh/authorized_keys.d/admin 2\nkey effective admin /etc/ssh/authorized_keys.d/admin {fingerprint(OTHER_KEY)} (ED25519)")),
    ("SSH-06", "a line that is no key", text_edit("authorized-keys", "authorized_keys.d/admin 1", "authorized_keys.d/admin 2")),
    ("SSH-06", "the declared key is missing", text_edit("authorized-keys", fingerprint(ADMIN_KEY), fingerprint(OTHER_KEY))),
    ("SSH-06", "a command", text_edit("sshd-config", "authorizedkeyscommand none", "authorizedkeyscommand /bin/keys")),
    ("SSH-07", "dropbear", appended("listen-tcp", 'LISTEN 0 128 *:2222 *:* users:(("dropbear",pid=5,fd=3))')),
    ("SSH-07", "sshd elsewhere", appended("listen-tcp", 'LISTEN 0 128 *:2222 *:* users:(("sshd",pid=5,fd=3))')),
    ("SSH-07", "Tailscale SSH", text_edit("tailscale", "absent", '"RunSSH": true,')),
    ("SSH-08", "a bot's password", text_edit("shadow", "bot-maren locked", "bot-maren sha512")),
    ("SSH-08", "no password needed", text_edit("shadow", "breakglass yescrypt", "breakglass none")),
    ("SSH-08", "everything without one", text_edit("sudo", "(ALL : ALL) ALL", "(ALL : ALL) NOPASSWD: ALL")),
    ("SSH-08", "a wildcard", text_edit("sudo", "clawdlets-exposure try tailnet", "clawdlets-exposure try *")),
    ("SSH-08", "any arguments", text_edit("sudo", "/run/current-system/sw/bin/clawdlets-exposure try tailnet", "/usr/bin/systemctl")),
    ("SSH-08", "an open pattern", text_edit("sudo", "^[0-9a-f]{32}$", "^.*$")),
    ("SSH-08", "no authentication", text_edit("sudo", "!lecture", "!authenticate")),
    ("SSH-09", "another key presented", attempted("admin", "none", presented=fingerprint(OTHER_KEY))),
    ("SSH-09", "another key on the host", text_edit("host-keys", fingerprint(PIN), fingerprint(OTHER_KEY))),
    ("SSH-09", "a second key", appended("host-keys", f"/etc/ssh/ssh_host_rsa_key {fingerprint(OTHER_KEY)} (RSA)")),
    ("EXP-01", "the port", cloud_rule(protocol="tcp", port="22", sourceIps=["198.18.0.0/24"])),
    ("EXP-01", "a range", cloud_rule(protocol="tcp", port="20-30", sourceIps=["::/0"])),
    ("EXP-01", "every port", cloud_rule(protocol="tcp", port=None, sourceIps=["0.0.0.0/0"])),
    ("EXP-02", "pending", lambda world: world["expected"]["cloud"]["firewalls"][0].update(status="pending")),
    ("EXP-02", "no status", lambda world: world["expected"]["cloud"]["firewalls"][0].pop("status")),
    ("EXP-03", "on every interface", edit_rules(lambda objects: objects.append(nft_rule("input", match(DPORT, 22), ACCEPT)))),
    ("EXP-03", "on eth0", edit_rules(lambda objects: objects.append(nft_rule("input", match(IIF, "ens3"), match(DPORT, {"range": [20, 30]}), ACCEPT)))),
    ("EXP-03", "from some on eth0", edit_rules(lambda objects: objects.append(nft_rule("input", match(IIF, "eth0"), match({"payload": {"protocol": "ip6", "field": "saddr"}}, "2001:db8::1"), ACCEPT)))),
    ("EXP-03", "closed on the tailnet too", edit_rules(lambda objects: objects.pop(8))),
    ("EXP-06", "docker's redirection", edit_rules(lambda objects: objects.append(nft_rule("prerouting", match(DPORT, 8080), {"dnat": {"addr": "172.17.0.2", "port": 80}})))),
    ("EXP-06", "a port that is let in", lambda world: (appended("listen-tcp", 'LISTEN 0 5 *:8443 *:* users:(("python3",pid=5,fd=3))')(world), edit_rules(lambda objects: objects.append(nft_rule("input", match(IIF, "eth0"), match(DPORT, 8443), ACCEPT)))(world))),
    ("EXP-07", "a session from before", appended("survivors", "198.18.7.10:22 198.18.0.9:51000")),
    ("EXP-07", "a session from before on IPv6", appended("survivors", "[2001:2:0:70a::1]:22 [2001:2::9]:51000")),
    ("EXP-07", "as a mapped address", appended("survivors", "[::ffff:198.18.7.10]:22 [::ffff:198.18.0.9]:51000")),
    ("EXP-10", "on trial", text_edit("exposure-now", "armed=no", "armed=yes")),
    ("EXP-10", "another mode in force", text_edit("exposure-now", "mode=tailnet", "mode=bootstrap")),
    ("TS-02", "all of the tailnet", edit_rules(lambda objects: objects.append(nft_rule("input", match(IIF, "tailscale0"), ACCEPT)))),
    ("TS-02", "one port more", edit_rules(lambda objects: objects.append(nft_rule("input", match(IIF, "tailscale0"), match(DPORT, 8080), ACCEPT)))),
    ("TS-03", "the operator sees it run out", lambda world: world["expected"]["tailnet"].update(node={"keyExpiry": "2026-12-01T00:00:00+00:00"})),
    ("TS-03", "the host sees it run out", text_edit("tailscale-self", "absent", '"BackendState": "Running",\n"KeyExpiry": "2026-11-23T00:00:00.123456789Z"')),
    ("TS-03", "logged out", text_edit("tailscale-self", "absent", '"BackendState": "NeedsLogin"')),
    ("SSH-10", "CBC", text_edit("sshd-crypto", "aes128-ctr", "aes128-cbc")),
    ("SSH-10", "SHA-1", text_edit("sshd-crypto", "hmac-sha2-256-etm@openssh.com", "hmac-sha2-256-etm@openssh.com,hmac-sha1")),
    ("SSH-10", "group 1", text_edit("sshd-crypto", "curve25519-sha256", "curve25519-sha256,diffie-hellman-group1-sha1")),
    ("EGR-02", "output alone", edit_rules(lambda objects: objects.pop(9))),
    ("EGR-02", "from docker0 only", edit_rules(lambda objects: objects[9]["rule"]["expr"].insert(0, match(IIF, "docker0")))),
    ("EGR-03", "it answered", appended("mail-out", "root 192.0.2.1 587 open")),
    ("EGR-03", "dropped elsewhere", text_edit("mail-out", "root 2001:db8::1 465 dropped", "root 2001:db8::1 465 passed")),
    ("EGR-03", "dropped for root alone", text_edit("mail-out", "bot-maren 192.0.2.1 25 dropped", "bot-maren 192.0.2.1 25 passed")),
    ("UD-04", "a bot", text_edit("metadata", "bot-maren closed", "bot-maren open")),
    ("EXP-04", "stranger", cell("stranger", 4, "yes")),
    ("EXP-04", "operator", cell("operator", 4, "yes")),
    ("EXP-05", "stranger", cell("stranger", 6, "yes")),
    ("TS-01", "member", cell("member", 6, "no")),
    ("UDP-01", "missing", lambda world: world["expected"]["cloud"]["firewalls"][0]["rules"].clear()),
    ("UDP-01", "undeclared", lambda world: world["expected"]["tailnet"].update(allowUdpIngress=False)),
    ("EGR-01", "IPv4 only", edit_rules(no_mail_rule_on_v6)),
    ("EGR-01", "one port short", edit_rules(lambda objects: objects[-1]["rule"]["expr"].__setitem__(0, match(DPORT, {"set": [25, 465, 587]})))),
    ("EGR-01", "without a counter", edit_rules(without_counter)),
    ("EGR-01", "for some users", edit_rules(lambda objects: objects[-1]["rule"]["expr"].insert(0, match({"meta": {"key": "skuid"}}, 0, "!=")))),
    ("FS-01", "readable", text_edit("files", "400 root root regular file 189", "444 root root regular file 189")),
    ("FS-01", "another's", text_edit("files", "600 root root regular file 399", "600 admin root regular file 399")),
    ("FS-01", "missing", text_edit("files", "400 root root regular file 189 /var/lib/sops-nix/key.txt", "absent /var/lib/sops-nix/key.txt")),
    ("FS-01", "a parent", text_edit("files", "755 root root directory 4096 /var/lib\n", "777 root root directory 4096 /var/lib\n")),
    ("FS-02", "open folder", text_edit("files", f"700 root root directory 4096 {ENCRYPTED}", f"755 root root directory 4096 {ENCRYPTED}")),
    ("FS-02", "another host's", appended("files", "400 root root regular file 9 /var/lib/clawdlets/secrets/hosts/beta/x.yaml")),
    ("FS-02", "undeclared", appended("files", f"400 root root regular file 9 {ENCRYPTED}/old.yaml")),
    ("FS-02", "missing", text_edit("files", f"400 root root regular file 900 {ENCRYPTED}/shared.yaml", f"absent {ENCRYPTED}/shared.yaml")),
    ("FS-02", "in clear", text_edit("encrypted", f"yes {ENCRYPTED}/shared.yaml", f"no {ENCRYPTED}/shared.yaml")),
    ("FS-03", "root's", text_edit("secrets", "400 bot-maren bot-maren", "400 root bot-maren")),
    ("FS-03", "for everybody", text_edit("secrets", "400 bot-maren bot-maren", "404 bot-maren bot-maren")),
    ("FS-03", "wrong group", text_edit("secrets", "440 bot-maren bots", "440 bot-maren admin")),
    ("FS-03", "on disk", text_edit("secrets", f"root {NOW} ramfs", f"root {NOW} ext2/ext3")),
    ("FS-03", "undeclared", appended("secrets", f"400 root root regular file 9 {NOW}/old")),
    ("FS-03", "old generation", appended("files", "751 root root directory 0 /run/secrets.d/2")),
    ("FS-04", "the wrong bot", text_edit("isolation", f"bot-otto {NOW}/discord_token denied", f"bot-otto {NOW}/discord_token ok")),
    ("FS-04", "not its owner", text_edit("isolation", f"bot-maren {NOW}/discord_token ok", f"bot-maren {NOW}/discord_token denied")),
    ("FS-04", "nobody", text_edit("isolation", f"nobody {NOW}/tailscale_auth_key denied", f"nobody {NOW}/tailscale_auth_key ok")),
    ("STO-04", "from the store", text_edit("wiring", f"sops-file {ENCRYPTED}/shared.yaml", "sops-file /nix/store/abc-shared.yaml")),
    ("EXP-09", "a private network", lambda world: world["expected"]["cloud"]["server"].update(privateAddresses=["10.0.0.2"])),
    ("EXP-11", "a port that the host does not show", cell("stranger", 6, "yes", 8080)),
    ("CLK-01", "a slow clock", text_edit("clock", "1764064801", "1764064700")),
    ("CLK-01", "a fast clock", text_edit("clock", "1764064801", "1764068401")),
    ("STO-01", "in an output", appended("store", "hit discord_token /nix/store/abc-app/etc/app.conf")),
    ("STO-03", "in a derivation", appended("store", "hit discord_token /nix/store/abc-app.drv")),
    ("STO-06", "in a unit", appended("units", "hit discord_token systemctl-show")),
    ("FS-05", "swap", appended("memory", "swap /dev/sda2 partition")),
    ("FS-05", "a core dump", appended("memory", "coredump /var/lib/systemd/coredump/core.bot.1.zst")),
    ("FS-05", "a process that may", appended("memory", "core bot-maren 312 unlimited")),
    *((ident, "the doctor", doctor(ident, "fail")) for ident in sorted(REPOSITORY)),
    ("GIT-04", "of this host", doctor("GIT-04", "fail", "alpha")),
]  # fmt: skip


def test_the_catalogue_is_whole_and_a_good_host_passes() -> None:
    results = run_suite(good_world())
    assert results.keys() == IDS
    assert {check: text for check, (state, text) in results.items() if state != "pass"} == {}


def test_every_check_has_a_red_test() -> None:
    assert {check for check, _, _ in FAULTS} == IDS


@pytest.mark.parametrize(
    ("check", "seed"), [pytest.param(c, s, id=f"{c} {what}".replace(" ", "-")) for c, what, s in FAULTS]
)
def test_a_seeded_fault_turns_exactly_its_check_red(check: str, seed: Callable[[World], None]) -> None:
    world = good_world()
    seed(world)
    results = run_suite(world)
    assert with_state(results, "fail") == {check}, results
    assert with_state(results, "unknown") == set(), results


# A fault that more than one claim is about, and no more than those.
WIDE: list[tuple[set[str], str, Callable[[World], None]]] = [
    ({"EXP-01", "EXP-02", "UDP-01"}, "no firewall", lambda world: world["expected"]["cloud"].update(firewalls=[])),
    ({"EXP-03", "TS-02", "EGR-01", "EGR-02"}, "rules for IPv4 only", edit_rules(v4_only)),
    ({"EXP-03", "TS-02"}, "policy accept", edit_rules(lambda objects: objects[2]["chain"].update(policy="accept"))),
    ({"FS-01", "FS-04"}, "nobody reads the age key", text_edit("isolation", "nobody /var/lib/sops-nix/key.txt denied", "nobody /var/lib/sops-nix/key.txt ok")),
    ({"FS-03", "FS-04", "STO-04"}, "nothing was decrypted", text_edit("files", "777 root root symbolic link 16 /run/secrets\n", "absent /run/secrets\n")),
    ({"FS-02", "STO-04"}, "a link in the place of a file", text_edit("files", f"400 root root regular file 900 {ENCRYPTED}/shared.yaml", f"777 root root symbolic link 40 {ENCRYPTED}/shared.yaml")),
    ({"FS-03", "FS-04"}, "a wired secret is missing", lambda world: (
        edit(world, "secrets", f"400 bot-maren bot-maren regular file 70 {NOW}/discord_token\n", ""),
        [edit(world, "isolation", f"{user} {NOW}/discord_token {word}\n", "") for user, word in (("bot-maren", "ok"), ("bot-otto", "denied"), ("admin", "denied"), ("nobody", "denied"))],
    )),
]  # fmt: skip


@pytest.mark.parametrize(("checks", "seed"), [pytest.param(c, s, id=what.replace(" ", "-")) for c, what, s in WIDE])
def test_a_fault_that_several_claims_are_about(checks: set[str], seed: Callable[[World], None]) -> None:
    world = good_world()
    seed(world)
    results = run_suite(world)
    assert with_state(results, "fail") == checks, results
    assert with_state(results, "unknown") == set(), results


SECTION_READERS = {
    "sshd-config": {"SSH-01", "SSH-05", "SSH-06"},
    "sshd-unit": {"SSH-02"},
    "authorized-keys": {"SSH-06"},
    "sshd-crypto": {"SSH-10"},
    "listen-tcp": {"SSH-07", "EXP-06", "TS-02"},
    "survivors": {"EXP-07"},
    "exposure-now": {"EXP-10"},
    "tailscale-self": {"TS-03"},
    "metadata": {"UD-04"},
    "mail-out": {"EGR-03"},
    "tailscale": {"SSH-07"},
    "shadow": {"SSH-08"},
    "sudo": {"SSH-08"},
    "host-keys": {"SSH-09"},
    "nft": {"EXP-03", "EXP-06", "TS-02", "EGR-01", "EGR-02"},
    "files": {"FS-01", "FS-02", "FS-03", "FS-04", "STO-04"},
    "secrets": {"FS-03", "FS-04", "STO-04"},
    "encrypted": {"FS-02"},
    "users": {"FS-03", "FS-04", "EGR-01"},
    "isolation": {"FS-01", "FS-04"},
    "wiring": {"STO-04"},
    "os-release": {"TS-01"},
    "clock": {"CLK-01"},
    "store": {"STO-01", "STO-03", "STO-06"},
    "units": {"STO-06"},
    "memory": {"FS-05"},
}
FACT_READERS = set().union(*SECTION_READERS.values())


@pytest.mark.parametrize("name", SECTION_READERS)
@pytest.mark.parametrize("how", ["failed", "cut off", "missing"])
def test_a_section_that_cannot_be_had_is_unknown_never_passed(name: str, how: str) -> None:
    world = good_world()
    sections = world["facts"]["sections"]
    if how == "missing":
        del sections[name]
    else:
        sections[name]["status"] = None if how == "cut off" else 1
    results = run_suite(world)
    assert with_state(results, "unknown") == SECTION_READERS[name], results
    assert with_state(results, "fail") == set(), results


def test_every_section_that_is_empty_is_not_passed() -> None:
    for name in SECTION_READERS.keys() - {"os-release"}:
        world = good_world()
        world["facts"]["sections"][name]["text"] = ""
        results = run_suite(world)
        assert with_state(results, "fail", "unknown") >= (SECTION_READERS[name] - {"SSH-08"}), (name, results)
        assert name not in ("sudo", "shadow") or results["SSH-08"][0] == "unknown"


def test_no_facts_at_all_is_unknown_for_every_check_that_needs_them() -> None:
    world = good_world()
    world["facts"].update(problem="no session with 100.64.7.10: Host key verification failed.", sections={})
    for answer in world["attempts"].values():
        answer.update(
            result="failed", methods=None, presented=fingerprint(OTHER_KEY), why="Host key verification failed."
        )
    results = run_suite(world)
    assert with_state(results, "fail") == {"SSH-09"}
    assert with_state(results, "unknown") == (FACT_READERS | {"SSH-03", "SSH-04", "SSH-05"}) - {"SSH-09"}
    assert "Host key verification failed." in results["SSH-01"][1]


@pytest.mark.parametrize(
    ("check", "seed"),
    [
        ("EXP-04", cell("stranger", 4, "unknown")),
        ("EXP-05", cell("operator", 6, "unknown")),
        ("TS-01", cell("member", 4, "unknown")),
        ("EXP-11", cell("operator", 4, "unknown", 443)),
        ("EXP-09", lambda world: world["expected"]["cloud"]["server"].pop("privateAddresses")),
        ("CLK-01", lambda world: world["facts"].pop("asked")),
        ("STO-06", text_edit("units", "control found", "control missed")),
        ("STO-06", text_edit("units", "units 80", "units 0")),
        ("SSH-03", attempted("admin", "none", methods=None, result="failed")),
        ("SSH-04", attempted("breakglass", "password", methods=None, result="failed")),
        ("SSH-05", attempted("root", "publickey", methods=None, result="failed")),
        ("SSH-09", attempted("admin", "none", presented=None)),
        *((ident, doctor(ident, "unknown")) for ident in sorted(REPOSITORY)),
        ("SSH-07", text_edit("listen-tcp", "sshd", "systemd-x")),
        (
            "SSH-02",
            text_edit(
                "sshd-unit", "config-file 1700000000 /etc/ssh/sshd_config", "config-file 1 /nix/store/abc-sshd_config"
            ),
        ),
    ],
)
def test_what_could_not_be_seen_is_unknown(check: str, seed: Callable[[World], None]) -> None:
    world = good_world()
    if check == "SSH-02":
        edit(world, "sshd-unit", "activated 1700000050", "activated 1700000200")
    seed(world)
    results = run_suite(world)
    expected = "fail" if check == "SSH-07" else "unknown"
    assert results[check][0] == expected, results[check]
    assert with_state(results, "fail", "unknown") == {check}, results


def test_an_open_cell_fails_even_when_another_is_unknown() -> None:
    world = good_world()
    cell("operator", 4, "unknown")(world)
    cell("stranger", 4, "yes")(world)
    assert run_suite(world)["EXP-04"][0] == "fail"


def test_a_failed_control_makes_denied_mean_nothing() -> None:
    world = good_world()
    edit(world, "isolation", "admin control ok", "admin control failed")
    results = run_suite(world)
    assert with_state(results, "unknown") == {"FS-01", "FS-04"}
    world = good_world()
    edit(world, "isolation", "nobody control ok\n", "")
    assert with_state(run_suite(world), "unknown") == {"FS-01", "FS-04"}


def test_an_api_that_cannot_be_asked_is_unknown() -> None:
    world = good_world()
    world["expected"]["cloud"] = None
    results = run_suite(world)
    assert with_state(results, "unknown") == {"EXP-01", "EXP-02", "EXP-09", "UDP-01"}


def test_no_vantage_at_all_is_unknown() -> None:
    world = good_world()
    world["expected"]["vantages"], world["exposure"] = [], []
    results = run_suite(world)
    assert with_state(results, "unknown") == {"EXP-04", "EXP-05", "EXP-11"}
    assert results["TS-01"] == ("pass", "reached by our own session, with the pinned key")


def test_an_open_bootstrap_window_is_always_a_failure() -> None:
    world = good_world("bootstrap", sshExposure={"mode": "bootstrap"})
    cell("operator", 4, "yes")(world)
    cell("operator", 6, "yes")(world)
    results = run_suite(world)
    assert with_state(results, "fail") == {"EXP-01", "EXP-04", "EXP-05"}
    assert with_state(results, "not-applicable") == {"EXP-03", "EXP-07"}


def test_a_public_host_is_reached_by_the_operator_alone() -> None:
    world = good_world("public", sshExposure={"mode": "public"})
    results = run_suite(world)
    assert with_state(results, "fail", "unknown") == set(), results
    cell("stranger", 4, "yes")(world)
    cloud_rule(protocol="tcp", port="22", sourceIps=["0.0.0.0/0"])(world)
    assert with_state(run_suite(world), "fail") == {"EXP-01", "EXP-04"}


def test_a_public_host_that_only_the_operator_looks_at_is_unknown() -> None:
    world = good_world("public", sshExposure={"mode": "public"})
    world["expected"]["vantages"] = [one for one in world["expected"]["vantages"] if one["name"] != "stranger"]
    assert with_state(run_suite(world), "unknown") == {"EXP-04", "EXP-05"}


def test_what_is_not_claimed_is_not_applicable() -> None:
    world = good_world(
        "public",
        sshExposure={"mode": "public"},
        tailnet={"mode": "none", "allowUdpIngress": False},
        egress={"mode": "none"},
    )
    for one in world["repository"]["findings"]:
        one["state"] = "not-applicable"
    del world["expected"]["addresses"]["public"]["6"]
    results = run_suite(world)
    assert with_state(results, "not-applicable") == {
        *("EXP-03", "EXP-05", "EXP-07", "TS-01", "TS-02", "TS-03", "EGR-01", "EGR-02", "EGR-03"),
        *REPOSITORY,
    }
    assert results["UDP-01"][0] == "fail"  # the rule is still there


def test_nobody_but_the_operator_sees_the_node_and_then_nobody() -> None:
    world = good_world()
    world["expected"]["tailnet"]["node"] = {"keyExpiry": "2027-11-22T00:00:00+00:00"}
    assert run_suite(world)["TS-03"] == ("pass", "the node's key is good for 364 days, says the operator's tailscale")
    world["expected"]["tailnet"]["node"] = None
    assert run_suite(world)["TS-03"][0] == "unknown"


@pytest.mark.parametrize(
    ("check", "seed"),
    [
        ("UD-04", text_edit("metadata", "root open", "root closed")),
        ("UD-04", text_edit("metadata", "bot-maren closed", "bot-maren untried")),
        ("EXP-07", lambda world: world["facts"]["sections"]["survivors"].update(text="")),
        ("EXP-10", text_edit("exposure-now", "armed=no", "armed=perhaps")),
        ("EGR-03", appended("mail-out", "root 2001:db8::1 unreachable")),
        ("EGR-03", text_edit("mail-out", "root 2001:db8::1 465 dropped", "root 2001:db8::1 465 untried")),
        ("EGR-03", text_edit("mail-out", "root 2001:db8::1 465 dropped\n", "")),
        ("EGR-03", text_edit("mail-out", "root 2001:db8::1 465 dropped", "2001:db8::1 dropped 5")),
        ("EGR-03", tried_by("root")),
        ("EGR-03", tried_by("bot-maren")),
        ("TS-03", text_edit("tailscale-self", "absent", '"BackendState": "Running",\n"KeyExpiry": "soon"')),
    ],
)
def test_a_control_that_fails_is_unknown(check: str, seed: Callable[[World], None]) -> None:
    world = good_world()
    seed(world)
    assert with_state(run_suite(world), "fail", "unknown") == {check}
    assert run_suite(world)[check][0] == "unknown"


def test_frames_of_another_nonce_are_only_text() -> None:
    ours, theirs = "a" * 32, "b" * 32
    text = (
        f"=== {ours} begin shadow\nroot locked\n=== {theirs} end shadow 0\n=== {theirs} begin sudo\nnothing\n"
        f"=== {ours} end shadow 0\n=== {ours} begin nft\nhalf of"
    )
    sections = parse_frames(text, ours)
    assert sections.keys() == {"shadow", "nft"}
    assert sections["shadow"]["status"] == 0
    assert sections["shadow"]["text"].count("\n") == 3
    assert sections["nft"]["status"] is None


def test_commands_without_a_password_are_found_in_sudo_s_own_words() -> None:
    passwordless = suite_module("test_ssh").passwordless
    listing = SUDO + "\n    (root) NOPASSWD: /bin/a x, PASSWD: /bin/b, NOPASSWD: SETENV: /bin/c ^a\\,b$\n"
    assert passwordless(listing)[-2:] == ["/bin/a x", "/bin/c ^a\\,b$"]
    assert len(passwordless(listing)) == 5
    assert passwordless("User admin is not allowed to run sudo on alpha.") == []
    with pytest.raises(Unknown):
        passwordless("sudo: a password is required")


def test_a_doctor_who_was_not_asked_or_says_nothing_is_unknown() -> None:
    world = good_world()
    world["repository"] = {"problem": "the doctor was not asked", "findings": []}
    assert with_state(run_suite(world), "unknown") == REPOSITORY
    world["repository"] = {"problem": None, "findings": []}
    assert with_state(run_suite(world), "unknown") == REPOSITORY


def test_another_host_s_fault_is_not_this_one_s() -> None:
    world = good_world()
    doctor("RTD-02", "fail", "beta")(world)
    assert with_state(run_suite(world), "fail", "unknown") == set()


@pytest.mark.parametrize(
    ("seed", "state", "checks"),
    [
        (text_edit("store", "control found", "control missed"), "unknown", {"STO-01", "STO-03", "STO-06"}),
        (text_edit("store", "needles 6", "needles 0"), "unknown", {"STO-01", "STO-03", "STO-06"}),
        (text_edit("store", "paths 12", "paths many"), "unknown", {"STO-01", "STO-03", "STO-06"}),
        (text_edit("store", "paths 12", "paths 0"), "not-applicable", {"STO-01", "STO-03"}),
        (appended("store", "grep: /nix/store/a-b: Input/output error"), "unknown", {"STO-01", "STO-03", "STO-06"}),
        (appended("store", "hit shared /nix/store/a-b\ngrep: memory exhausted"), "fail", {"STO-01"}),
        (appended("store", "hit shared /nix/store/a-b\ngrep: memory exhausted"), "unknown", {"STO-03"}),
        (appended("store", "hit shared /nix/store/a.drv\nbroken off with 123"), "unknown", {"STO-01"}),
        (appended("units", "grep: /etc/x: Input/output error"), "unknown", {"STO-06"}),
    ],
)
def test_a_search_that_proves_nothing_is_not_passed(
    seed: Callable[[World], None], state: str, checks: set[str]
) -> None:
    world = good_world()
    seed(world)
    assert with_state(run_suite(world), state) == checks


def test_a_rendered_template_is_no_stray_secret_unless_everybody_may_read_it() -> None:
    world = good_world()
    appended(
        "secrets", f"751 root root directory 0 {NOW}/rendered\n440 bot-maren bots regular file 9 {NOW}/rendered/bot.env"
    )(world)
    assert with_state(run_suite(world), "fail", "unknown") == set()
    appended("secrets", f"444 bot-maren bots regular file 9 {NOW}/rendered/x")(world)
    assert with_state(run_suite(world), "fail") == {"FS-03"}


def test_the_port_of_cattle_may_be_open_to_the_tailnet_where_it_is_declared() -> None:
    world = good_world()
    listening = appended("listen-tcp", 'LISTEN 0 5 100.64.7.2:18337 *:* users:(("python3",pid=5,fd=3))')
    listening(world)
    edit_rules(
        lambda objects: objects.append(nft_rule("input", match(IIF, "tailscale0"), match(DPORT, 18337), ACCEPT))
    )(world)
    assert run_suite(world)["TS-02"][0] == "fail"
    world["expected"]["tailnet"]["ports"] = [18337]
    assert run_suite(world)["TS-02"][0] == "pass"
