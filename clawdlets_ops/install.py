"""Install: NixOS with this host's identity and secrets onto a fresh server, never over an installed one.

Whether a host is installed is read from the host itself: the key it shows. The identity is made before the host, so a
server that shows the pinned key runs our system, and the first contact after the installation is authenticated already.
The fresh server's own key can only be pinned when it is first met (ADR 0003); it is used until the installation.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from clawdlets_ops import nixos_anywhere, provision, ssh, tailnet
from clawdlets_ops.errors import ClawdletsError, HostKeyError, InstallRefused, SettingsError, UnreachableError
from clawdlets_ops.files import ensure_dir, locked, write_atomic
from clawdlets_ops.fleet import Host
from clawdlets_ops.hetzner import Cloud, Server
from clawdlets_ops.layout import INSTALL_MARKER
from clawdlets_ops.process import Runner, require_program
from clawdlets_ops.project import Project

ADMIN = "admin"
FIRST_CONTACT_S = 300.0
BACK_AFTER_REBOOT_S = 300.0
ACTIVATED_WITHIN_S = 120.0
LOCK_WAIT_S = 1200.0
ARCHITECTURE = {"x86_64-linux": "x86_64", "aarch64-linux": "aarch64"}


class TargetState(StrEnum):
    """What stands at the address. UNKNOWN is never treated as FRESH."""

    ABSENT = "absent"
    FRESH = "fresh"
    INSTALLED = "installed"
    STRANGER = "stranger"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Seen:
    """What was seen of a target. ``address`` is the one that showed ``key``."""

    state: TargetState
    address: str = ""
    key: str = ""


@dataclass(frozen=True)
class InstallPlan:
    """``phases`` is empty when there is nothing to do."""

    host: str
    phases: tuple[str, ...]
    why: str

    @property
    def empty(self) -> bool:
        """True when the host is installed."""
        return not self.phases

    def __str__(self) -> str:
        return f"{self.why}: {', '.join(self.phases)}" if self.phases else self.why


def plan_reinstall(host: str, server: Server | None, declared: Host) -> InstallPlan:
    """The plan for a host that the operator named for it; pure."""
    if server is None:
        return plan(host, Seen(TargetState.ABSENT))
    return InstallPlan(
        host, nixos_anywhere.PHASES, f"WIPE {host}: rebuild it from {declared.hetzner.image}, then install NixOS"
    )


def wipe(
    project: Project, host: str, *, runner: Runner, cloud: Cloud, server: Server, say: Callable[[str], None]
) -> Server:
    """Open the edge again and rebuild the server from its image; everything on its disk is gone."""
    if host not in project.reinstall:
        raise InstallRefused("was not named to be wiped", where=host, fix=f"--data reinstall={host}")
    server = provision.apply(project, host, runner=runner, cloud=cloud, window_open=True, say=say)
    say(f"rebuild server {server.id} from {project.fleet.host(host).hetzner.image}")
    cloud.rebuild(server, project.fleet.host(host).hetzner.image)
    project.layout.installer_pin(host).unlink(missing_ok=True)
    return server


def classify(key: str | None, *, pin: str | None, installer_pin: str | None) -> TargetState:
    """What a presented host key says about the target; pure."""
    if key is None:
        return TargetState.UNKNOWN
    if pin is not None and key == pin:
        return TargetState.INSTALLED
    if installer_pin is None or key == installer_pin:
        return TargetState.FRESH
    return TargetState.STRANGER


def plan(host: str, seen: Seen, *, edge_open: bool = True) -> InstallPlan:
    """What to do for a target in this state; pure. HostKeyError for a stranger.

    A server that does not answer may still be booting: with its edge open, ``apply`` waits for it and looks again before
    it does anything. Behind a closed edge an answer can only come over the tailnet: UnreachableError.
    """
    match seen.state:
        case TargetState.INSTALLED:
            return InstallPlan(host, (), "installed (shows its pinned host key)")
        case TargetState.ABSENT | TargetState.FRESH:
            return InstallPlan(host, nixos_anywhere.PHASES, "install NixOS")
        case TargetState.STRANGER:
            raise HostKeyError(
                f"shows the host key {ssh.fingerprint(seen.key)}, which is neither the host's own nor the one that the "
                "fresh server had",
                where=f"{host} ({seen.address})",
                fix="somebody else may be answering, or the server was rebuilt: find out before going on",
            )
        case TargetState.UNKNOWN if edge_open:
            return InstallPlan(host, nixos_anywhere.PHASES, "wait for the server to answer, and install what is fresh")
        case TargetState.UNKNOWN:
            raise UnreachableError(
                "the server exists and is locked down, but does not answer over the tailnet",
                where=host,
                fix="is this machine on the tailnet? Else use the server's console; "
                "a host that cannot be looked at is never installed over",
            )


def resume_phases(os_release: str, *, mounted: bool, system_laid: bool) -> tuple[str, ...]:
    """The phases still to do, from how the target stands (facts: nixos-anywhere's phases are each repeatable from there)."""
    if "VARIANT_ID=installer" not in os_release.replace('"', ""):
        return nixos_anywhere.PHASES
    if mounted or system_laid:
        return ("install", "reboot")  # laying a system again is safe, and makes sure that it is whole
    return ("disko", "install", "reboot")


def refuse_unsuitable(host: str, declared: Host, *, machine: str, os_release: str) -> None:
    """InstallRefused unless the target is a machine that may be formatted for ``host``; pure."""
    wanted = ARCHITECTURE[declared.system]
    if machine != wanted:
        raise InstallRefused(
            f"is {machine}, declared is {declared.system}", where=host, fix=f"correct hosts.{host}.system"
        )
    fields = os_release.replace('"', "").splitlines()
    if "ID=nixos" in fields and "VARIANT_ID=installer" not in fields:
        raise InstallRefused(
            "an installed NixOS answers here, with another host key than ours: it is not formatted",
            where=host,
            fix=f"if it is to be overwritten, say so by name: --data reinstall={host}",
        )


def look(runner: Runner, host: str, *, server: Server | None, pin: str | None, installer_pin: str | None) -> Seen:
    """See what stands at the host's addresses: the tailnet first, where a locked-down host answers at once. No login."""
    if server is None:
        return Seen(TargetState.ABSENT)
    for address in _tailnet_addresses(runner, host) if pin else ():
        # Only the pinned key means anything here: a name in a tailnet is anybody's.
        if ssh.presented_key(address, timeout_s=ssh.LOOK_TIMEOUT_S) == pin:
            return Seen(TargetState.INSTALLED, address, pin or "")
    for address in server.addresses.values():
        key = ssh.presented_key(address, timeout_s=ssh.LOOK_TIMEOUT_S)
        state = classify(key, pin=pin, installer_pin=installer_pin)
        if state is not TargetState.UNKNOWN:
            return Seen(state, address, key or "")
    return Seen(TargetState.UNKNOWN)


def _tailnet_addresses(runner: Runner, host: str) -> tuple[str, ...]:
    """Where the tailnet says that the host is; nothing when this machine is not on it, which is no fault here."""
    if runner.which("tailscale") is None:
        return ()
    try:
        peer = tailnet.find_peer(runner, host)
    except ClawdletsError:
        return ()
    return tuple(peer.addresses.values()) if peer else ()


def flake_reference(root: Path, host: str) -> str:
    """The project's flake for ``host``. Only a git checkout will do: any other reference copies the whole folder, with
    the private keys of ``.clawdlets``, into the world-readable store."""
    if not (root / ".git").exists():
        raise SettingsError(
            "the project is not a git checkout; Nix would copy the folder whole, private keys included, to its store",
            where=str(root),
            fix="git init, with /.clawdlets/ in .gitignore",
        )
    return f"git+file://{root}#{host}"


def require_means(project: Project, host: str, *, runner: Runner) -> tuple[str, Path]:
    """What an installation needs on this machine: the flake reference and the OpenSSH client. SettingsError,
    ToolMissingError; also asked before a server is made."""
    project.ssh_identity_file(host)
    require_program(
        runner,
        "nixos-anywhere",
        "nix profile install github:nix-community/nixos-anywhere, or rehearse on the lab (clawdlets lab up)",
    )
    real_ssh = require_program(runner, "ssh", "install the OpenSSH client")
    return flake_reference(project.layout.root, host), real_ssh


def apply(
    project: Project,
    host: str,
    *,
    runner: Runner,
    server: Server,
    pin: str,
    say: Callable[[str], None] = lambda _: None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> None:
    """Install from wherever the target stands, prove that the host that comes back is ours, and write the receipt.

    Under the host's lock, which the running phase inherits: after a kill, the next run waits for it and then goes on.
    """
    declared = project.fleet.host(host)
    identity = project.ssh_identity_file(host)
    flake, real_ssh = require_means(project, host, runner=runner)
    with locked(project.layout.lock(host), what=f"the installation of {host}", wait_s=LOCK_WAIT_S) as lock_fd:
        started = now()
        address, key = _first_contact(project, host, server=server, pin=pin, say=say)
        if key != pin:
            phases = _look_inside(host, declared, ssh.Target(host, address, "root", identity, key))
            folder = ensure_dir(project.layout.reports(host))
            known_hosts = folder / "installer_known_hosts"
            write_atomic(known_hosts, ssh.known_hosts_lines(dict.fromkeys(server.addresses.values(), key)))
            spec = nixos_anywhere.InstallSpec(
                flake=flake,
                address=address,
                identity_file=identity,
                extra_files=project.layout.extra_files(host),
                shim_dir=ssh.shim(folder / "shim", real_ssh=real_ssh, known_hosts=known_hosts, identity_file=identity),
            )
            for phase in phases:
                say(f"phase {phase}")
                nixos_anywhere.run_phase(
                    runner,
                    spec,
                    phase,
                    search_path=project.environ.get("PATH", ""),
                    log_file=folder / f"install-{phase}.log",
                    lock_fd=lock_fd,
                    say=say,
                )
        say("wait for the installed host to show its pinned key")
        address, _ = ssh.wait_for_key(
            list(server.addresses.values()),
            frozenset({pin}),
            why=f"{host} after its installation",
            timeout_s=BACK_AFTER_REBOOT_S,
            poll_s=project.poll_interval_s,
        )
        marker = _check_activated(ssh.Target(host, address, ADMIN, identity, pin))
        receipt = {
            "host": host,
            "startedAt": started.isoformat(),
            "finishedAt": now().isoformat(),
            "flake": flake,
            "hostKey": ssh.fingerprint(pin),
            "installedAs": marker,
        }
        write_atomic(project.layout.reports(host) / "install-receipt.json", json.dumps(receipt, indent=2) + "\n")
        project.layout.installer_pin(host).unlink(missing_ok=True)


def _first_contact(
    project: Project, host: str, *, server: Server, pin: str, say: Callable[[str], None]
) -> tuple[str, str]:
    """Address and key of the target; pins the key of a fresh server when it is met for the first time."""
    pin_file = project.layout.installer_pin(host)
    known = pin_file.read_text().strip() if pin_file.exists() else None
    if known is not None:
        server_id, _, known_key = known.partition(" ")
        known = known_key if server_id == str(server.id) else None  # a pin of an earlier server says nothing
    wanted = frozenset({pin, known}) if known else frozenset()
    addresses = list(server.addresses.values())
    say("wait for an SSH server")
    address, key = ssh.wait_for_key(
        addresses, wanted, why=f"first contact with {host}", timeout_s=FIRST_CONTACT_S, poll_s=project.poll_interval_s
    )
    if key != pin and known is None:
        for other in addresses:
            if ssh.presented_key(other) not in (None, key):
                raise HostKeyError(f"its addresses show different host keys ({address}, {other})", where=host)
        ensure_dir(pin_file.parent)
        write_atomic(pin_file, f"{server.id} {key}\n")
        say(f"pinned the fresh server's key {ssh.fingerprint(key)} at first sight")
    return address, key


def _look_inside(host: str, declared: Host, target: ssh.Target) -> tuple[str, ...]:
    """The phases to do, after the gates."""
    with ssh.session(target) as shell:
        machine = shell.check("uname -m").strip()
        os_release = shell.check("cat /etc/os-release")
        mounted = shell.run("findmnt --noheadings /mnt || test -d /mnt/etc").ok
        laid = shell.run("test -L /mnt/nix/var/nix/profiles/system").ok
    refuse_unsuitable(host, declared, machine=machine, os_release=os_release)
    return resume_phases(os_release, mounted=mounted, system_laid=laid)


def _check_activated(target: ssh.Target) -> object:
    """The install marker, once the host runs with its secrets in place."""
    wait = int(ACTIVATED_WITHIN_S)
    with ssh.session(target) as shell:
        state = shell.run(f"timeout {wait} systemctl is-system-running --wait", timeout_s=wait + 10)
        if not state.ok:
            failed = shell.run("systemctl list-units --failed --no-legend --plain").stdout.strip()
            raise InstallRefused(
                f"is installed, but its system is {state.stdout.strip() or 'not running'}: {failed}",
                where=str(target),
                fix="journalctl on the host says why; when a secret is at fault, put it right and run again",
            )
        if not shell.run("test -d /run/secrets/").ok:
            raise InstallRefused("is installed, but no secret was decrypted", where=str(target))
        return json.loads(shell.check(f"cat {shlex.quote(str(INSTALL_MARKER.path))}"))
