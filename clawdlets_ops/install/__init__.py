"""Install: NixOS with this host's identity and secrets onto a fresh server, never over an installed one.

Whether a host is installed is read from the host itself: the key it shows. The identity is made before the host, so a
server that shows the pinned key runs our system, and the first contact after the installation is authenticated already.
The fresh server's own key can only be pinned when it is first met (ADR 0003); it is used until the installation.

``target`` sees from outside, ``gates`` decides what must not be touched, ``inside`` looks between the phases, ``receipt``
writes down what was done; here is the order of it all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from clawdlets_ops import nixos_anywhere, provision, ssh
from clawdlets_ops.errors import (
    ClawdletsError,
    CommandError,
    CommandTimeout,
    HostKeyError,
    InstallRefused,
    OutcomeUnknown,
    SettingsError,
)
from clawdlets_ops.files import NO_ROOM, ensure_dir, locked, write_atomic
from clawdlets_ops.fleet import Host
from clawdlets_ops.hetzner import Cloud, Server
from clawdlets_ops.install import gates, inside
from clawdlets_ops.install.inside import Standing, resume_phases
from clawdlets_ops.install.proof import payload_digest, prove
from clawdlets_ops.install.receipt import Progress, compose, flake_revision, to_text, tool_versions
from clawdlets_ops.install.shipment import check_shipment
from clawdlets_ops.install.target import (
    InstallPlan,
    Known,
    Seen,
    TargetState,
    classify,
    look,
    plan,
    plan_reinstall,
    read_known,
    stranger,
)
from clawdlets_ops.process import Runner, require_program
from clawdlets_ops.project import Project
from clawdlets_ops.secrets import payload

__all__ = [
    "ADMIN",
    "InstallPlan",
    "Known",
    "Seen",
    "TargetState",
    "apply",
    "classify",
    "flake_reference",
    "look",
    "plan",
    "plan_reinstall",
    "read_known",
    "require_means",
    "resume_phases",
    "wipe",
]

ADMIN: Final = "admin"
FIRST_CONTACT_S = 300.0
SEEN_BEFORE_S = 120.0
"""How long a server that has been met before, and so has booted, may be silent."""
BACK_AFTER_REBOOT_S = 300.0
LOCK_WAIT_S = 4000.0
"""Longer than the longest phase: what a killed run left at work is waited for."""
KEXEC_TRIES = 2


@dataclass(frozen=True, slots=True)
class _Run:
    """One installation under way: everything that its steps share."""

    project: Project
    host: str
    declared: Host
    runner: Runner
    server: Server
    spec: nixos_anywhere.InstallSpec
    target: ssh.Target
    folder: Path
    progress: Progress
    lock_fd: int
    say: Callable[[str], None]
    now: Callable[[], datetime]

    @property
    def ours(self) -> str:
        """How we sign on the target: the same for every run of this checkout, and for no other."""
        checkout = hashlib.sha256(f"{os.uname().nodename}:{self.project.layout.root}".encode()).hexdigest()[:8]
        return f"{self.project.operator} on {os.uname().nodename} (checkout {checkout})"


def wipe(
    project: Project, host: str, *, runner: Runner, cloud: Cloud, server: Server, say: Callable[[str], None]
) -> Server:
    """Open the edge again and rebuild the server from its image; everything on its disk is gone."""
    if host not in project.reinstall:
        raise InstallRefused("was not named to be wiped", where=host, fix=f"--data reinstall={host}")
    server = provision.apply(project, host, runner=runner, cloud=cloud, window_open=True, say=say)
    say(f"rebuild server {server.id} from {project.fleet.host(host).hetzner.image}")
    try:
        cloud.rebuild(server, project.fleet.host(host).hetzner.image)
    except OutcomeUnknown:
        _forget(project, host)  # its disk may be a new one, and is looked at as such
        raise
    _forget(project, host)
    return server


def _forget(project: Project, host: str) -> None:
    for known in (project.layout.installer_pin(host), project.layout.install_receipt(host)):
        known.unlink(missing_ok=True)  # they speak of what was there before
    shutil.rmtree(project.layout.install_dir(host), ignore_errors=True)


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
    BusyError at once when a run that lives holds it.
    """
    layout, declared = project.layout, project.fleet.host(host)
    flake, real_ssh = require_means(project, host, runner=runner)
    holder = f"{project.operator} on {os.uname().nodename} (process {os.getpid()}, since {now():%H:%M:%S} UTC)"
    with (
        _disk_errors_told(host),
        locked(
            layout.lock(host),
            what=f"the installation of {host}",
            wait_s=LOCK_WAIT_S,
            holder=holder,
            refuse_living=True,
            sleep=_told_once(say),
        ) as lock_fd,
    ):
        shipment = check_shipment(project, host, runner, say)
        known = read_known(layout, host, server)
        folder = ensure_dir(layout.install_dir(host))
        nixos_anywhere.sweep(folder / "scratch")
        progress = Progress.read(folder / f"progress-{server.id}.json")
        address, key = _first_contact(project, host, server=server, pin=pin, known=known, say=say)
        if key != pin:
            if not progress.first_contact:
                progress.contact(ssh.fingerprint(key), server.addresses, now())
            identity = project.ssh_identity_file(host)
            write_atomic(folder / "known_hosts", ssh.known_hosts_lines(dict.fromkeys(server.addresses.values(), key)))
            spec = nixos_anywhere.InstallSpec(
                flake=flake,
                address=address,
                identity_file=identity,
                extra_files=layout.extra_files(host),
                shim_dir=ssh.shim(
                    folder / "bin", real_ssh=real_ssh, known_hosts=folder / "known_hosts", identity_file=identity
                ),
                kexec=project.environ.get("CLAWDLETS_KEXEC", ""),
            )
            target = ssh.Target(host, address, "root", identity, key)
            _go_through(
                _Run(project, host, declared, runner, server, spec, target, folder, progress, lock_fd, say, now)
            )
        say("wait for the installed host to show its pinned key")
        address, _ = ssh.wait_for_key(
            list(server.addresses.values()),
            frozenset({pin}),
            why=f"{host} after its installation",
            timeout_s=BACK_AFTER_REBOOT_S,
            poll_s=project.poll_interval_s,
        )
        digest = payload_digest(layout.extra_files(host))
        proof = prove(project, host, ssh.Target(host, address, ADMIN, project.ssh_identity_file(host), pin), digest)
        document = {
            **compose(
                host,
                server_id=server.id,
                operator=project.operator,
                digest=digest,
                tools=tool_versions(runner),
                flake=flake_revision(runner, layout.root, host),
                progress=progress,
                now=now,
            ),
            "gates": [finding.as_json() for finding in shipment],
            "hostKey": ssh.fingerprint(pin),
            **proof,
        }
        ensure_dir(layout.reports(host))
        write_atomic(layout.install_receipt(host), to_text(document))
        layout.installer_pin(host).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _first_contact(
    project: Project, host: str, *, server: Server, pin: str, known: Known, say: Callable[[str], None]
) -> tuple[str, str]:
    """Address and key of the target; pins the key of a fresh server when it is met for the first time."""
    pin_file = project.layout.installer_pin(host)
    addresses = list(server.addresses.values())
    say("wait for an SSH server")
    address, key = ssh.wait_for_key(
        addresses,
        frozenset({pin, known.installer_pin}) if known.installer_pin else frozenset(),
        why=f"first contact with {host}",
        timeout_s=SEEN_BEFORE_S if known.installer_pin else FIRST_CONTACT_S,
        poll_s=project.poll_interval_s,
    )
    if classify(key, pin=pin, known=known) is TargetState.STRANGER:
        raise stranger(host, address, key)
    if key != pin and known.installer_pin is None:
        for other in addresses:
            if ssh.presented_key(other) not in (None, key):
                raise HostKeyError(f"its addresses show different host keys ({address}, {other})", where=host)
        ensure_dir(pin_file.parent)
        write_atomic(pin_file, f"{server.id} {key}\n")
        say(f"pinned the fresh server's key {ssh.fingerprint(key)} at first sight")
    return address, key


def _go_through(run: _Run) -> None:
    """From where the target stands to its reboot: look, do the next phase, look again."""
    standing = _look_inside(run, "first look")
    _phase(run, nixos_anywhere.PREFLIGHT)
    tried_kexec = 0
    while (phase := standing.phases[0]) != "reboot":
        if phase == "kexec":
            tried_kexec += 1
        elif phase == "disko" and standing.mounted:
            run.say("unmount what a formatting that was cut short left")
            with ssh.session(run.target) as shell:
                inside.clear_mounts(shell, run.host)
        failure = _attempt(run, phase)
        standing = _look_inside(run, phase)
        if standing.phases[0] != phase:
            continue
        if phase != "kexec" or tried_kexec >= KEXEC_TRIES:
            raise _no_progress(run.host, phase, failure)
        run.say("kexec left the server in its old system: once more")
    shipped = payload.observe(run.project.layout.extra_files(run.host))
    if shipped is None:
        raise InstallRefused("has no payload here any more", where=run.host, fix="run again")
    with ssh.session(run.target) as shell:
        inside.check_laid(shell, run.host, shipped)
        inside.write_receipt(shell, to_text(_receipt_for_host(run)))
    _phase(run, "reboot")


def _look_inside(run: _Run, step: str) -> Standing:
    """Log in with the pinned key, pass the gates, and take our turn. HostKeyError, InstallRefused, BusyError."""
    with ssh.session(run.target) as shell:
        standing = inside.read_standing(shell, run.declared)
        gates.refuse(run.host, gates.target_gates(run.host, run.declared, standing.facts))
        inside.take_lease(shell, run.host, run.ours)
    run.progress.met(step)
    return standing


def _attempt(run: _Run, phase: str) -> CommandError | None:
    """Run ``phase``; the error of a kexec that may simply be tried again, after the target answers."""
    try:
        _phase(run, phase)
    except CommandError as error:
        if phase != "kexec" or not (isinstance(error, CommandTimeout) or "Failed to kexec" in error.what):
            raise
        run.say(f"kexec did not end well: {error.what.splitlines()[0]}")
        ssh.wait_for_key(
            list(run.server.addresses.values()),
            frozenset({run.target.pin}),
            why=f"{run.host} after kexec",
            timeout_s=SEEN_BEFORE_S,
            poll_s=run.project.poll_interval_s,
        )
        return error
    return None


def _no_progress(host: str, phase: str, failure: CommandError | None) -> InstallRefused:
    why = f": {failure.what}" if failure else ""
    if phase == "kexec":
        return InstallRefused(
            f"is still in its old system after {KEXEC_TRIES} tries to start the installer{why}",
            where=host,
            fix="look at the server's console; another hetzner.image (debian-12, ubuntu-24.04) may do",
        )
    return InstallRefused(
        f"the {phase} phase ended well, and the target stands as before{why}",
        where=host,
        fix="read the phase's log; run again",
    )


def _phase(run: _Run, phase: str) -> None:
    run.say(f"phase {phase}")
    ensure_dir(run.project.layout.reports(run.host))
    started = run.now()
    duration_s = nixos_anywhere.run_phase(
        run.runner,
        run.spec,
        phase,
        scratch=run.folder / "scratch",
        search_path=run.project.environ.get("PATH", ""),
        log_file=run.project.layout.reports(run.host) / f"install-{phase}.log",
        lock_fd=run.lock_fd,
        say=run.say,
    )
    run.progress.ended(phase, started, duration_s)


def _receipt_for_host(run: _Run) -> dict[str, Any]:
    layout = run.project.layout
    return compose(
        run.host,
        server_id=run.server.id,
        operator=run.project.operator,
        digest=payload_digest(layout.extra_files(run.host)),
        tools=tool_versions(run.runner),
        flake=flake_revision(run.runner, layout.root, run.host),
        progress=run.progress,
        now=run.now,
    )


@contextmanager
def _disk_errors_told(host: str) -> Iterator[None]:
    """This machine's own disk, in a sentence: nothing on the target is lost by it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ClawdletsError) or error.errno not in NO_ROOM:
            raise
        raise SettingsError(
            f"this machine cannot write {error.filename or 'its runtime dir'} ({error.strerror}); the installation stopped",
            where=host,
            fix="make room (df), and run again: the installation goes on where the target stands",
        ) from error


def _told_once(say: Callable[[str], None]) -> Callable[[float], None]:
    """A sleep that says, the first time, what is waited for."""
    told = False

    def sleep(seconds: float) -> None:
        nonlocal told
        if not told:
            say("wait for the phase that a killed run left at work")
            told = True
        time.sleep(seconds)

    return sleep
