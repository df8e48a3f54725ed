"""The lab's tailnet made of the real programs: headscale, and a tailscaled for each node, in the lab's own namespaces.

headscale stands at the tailnet control server's address: coordination and DERP on port 443, STUN on 3478. TLS with a
certificate of its own, as tailscaled falls back to HTTPS whenever it has to connect twice in two minutes. The operator's
node lives in the tailnet's namespace, the member's in its own; each has a leg to the internet for its WireGuard packets.
The root namespace is no node: tailscaled would put its rules and routes beside those of a Tailscale that the operator may
really have. It reaches the tailnet through the operator's node, with that node's address. Nothing here knows an address
outside of the lab: no public DERP map, no log, update or coordination server.

Each server's node is its own (``host_tailnet.py``). The places for the others are ``addressing.plan_nodes``.

Source of the settings: headscale's config-example.yaml (0.28), ``tailscaled --help`` (1.94).
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from clawdlets_ops.errors import CommandError, LabError
from clawdlets_ops.files import ensure_dir, read_private, write_atomic
from clawdlets_ops.lab.addressing import CONTROL_PORT, NODES, Addressing
from clawdlets_ops.lab.processes import Group, wait_until
from clawdlets_ops.process import Background, Command, Result, Runner, spawn
from clawdlets_ops.sensitive import Secret

AUTO: Final = "auto"
REAL: Final = "real"
STAND_IN: Final = "stand-in"
DOMAIN: Final = "lab.internal"
TAG: Final = "tag:clawdlets"
CATTLE_TAG: Final = "tag:clawdlets-cattle"
BOOTSTRAP_PORT: Final = 18337
STUN_PORT: Final = 3478
LOGIN_PORT: Final = 443
KEY_EXPIRES_IN_S: Final = 90 * 24 * 3600
EPHEMERAL_GONE_AFTER_S: Final = 70  # headscale refuses 65 and less

_START_TIMEOUT_S = 20.0
_COMMAND_TIMEOUT_S = 30.0
_JOIN_TIMEOUT_S = 45
_STOP_TIMEOUT_S = 2.0
_SOCKET_PATH_CHARS = 107  # unix(7)
_TUN = Path("/dev/net/tun")


@dataclass(frozen=True)
class Programs:
    """What ``tools/prepare tailnet`` builds."""

    headscale: Path
    tailscaled: Path
    tailscale: Path

    @classmethod
    def find(cls, tools: Path) -> Programs | None:
        """Those below ``.cache/tools``, None unless all are there."""
        found = cls(tools / "bin" / "headscale", tools / "bin" / "tailscaled", tools / "tailnet" / "tailscale")
        return found if all(path.exists() for path in (found.headscale, found.tailscaled, found.tailscale)) else None

    def versions(self, runner: Runner) -> str:
        """What they say of themselves; CommandError."""
        headscale = runner.run(Command([self.headscale, "version", "--output", "json"], "ask headscale")).check()
        tailscale = runner.run(Command([self.tailscale, "version"], "ask tailscale")).check()
        # Without the marks of a build that knows nothing of its source.
        return f"headscale {headscale.json()['version']}, tailscale {tailscale.stdout.split()[0].partition('-')[0]}"


def obstacle(tools: Path, folder: Path, path: str) -> LabError | None:
    """What keeps a lab from a real tailnet, None for nothing. ``tools``: ``.cache/tools``; ``folder``: where its sockets
    and keys would be; ``path``: the search path."""
    if Programs.find(tools) is None:
        return LabError("headscale and tailscaled are not built", where=str(tools), fix="make tailnet")
    if shutil.which("openssl", path=path) is None:
        return LabError("openssl is not on PATH", where="openssl", fix="make setup (Debian package openssl)")
    if not _TUN.exists():
        return LabError("there is no such device", where=str(_TUN), fix="modprobe tun")
    if len(str(folder / "headscale.sock")) > _SOCKET_PATH_CHARS:
        return LabError(
            "the path is too long for a socket", where=str(folder), fix="use a checkout with a shorter path"
        )
    return None


def choose(wanted: str, tools: Path, folder: Path, path: str) -> str:
    """``real`` or ``stand-in``, for ``auto`` whichever is possible; LabError when the real one is wanted and is not."""
    hindered = None if wanted == STAND_IN else obstacle(tools, folder, path)
    if wanted == REAL and hindered is not None:
        raise hindered
    return STAND_IN if wanted == STAND_IN or hindered is not None else REAL


def login_server(net: Addressing) -> str:
    """What a node is told with ``--login-server``."""
    return f"https://{net.outside(4)[0]}"


def settings(net: Addressing, folder: Path) -> dict[str, Any]:
    """headscale's configuration: everything at one address of the lab, and nothing that leads out of it."""
    address = net.outside(4)[0]
    return {
        "server_url": login_server(net),
        "listen_addr": f"{address}:{LOGIN_PORT}",
        "tls_cert_path": str(folder / "cert.pem"),
        "tls_key_path": str(folder / "cert.key"),
        "metrics_listen_addr": "",
        "grpc_listen_addr": "127.0.0.1:50443",
        "unix_socket": str(folder / "headscale.sock"),
        "unix_socket_permission": "0700",
        "noise": {"private_key_path": str(folder / "noise.key")},
        "prefixes": {
            "v4": f"100.64.{net.number}.0/24",
            "v6": f"fd7a:115c:a1e0:{net.number:x}::/64",
            "allocation": "sequential",
        },
        "derp": {
            "server": {
                "enabled": True,
                "region_id": 900,
                "region_code": "lab",
                "region_name": "the lab",
                "verify_clients": True,
                "stun_listen_addr": f"{address}:{STUN_PORT}",
                "private_key_path": str(folder / "derp.key"),
                "automatically_add_embedded_derp_region": True,
                "ipv4": address,
                "ipv6": "none",  # said, so that no node waits three seconds for an answer over IPv6
            },
            "urls": [],
            "paths": [],
            "auto_update_enabled": False,
        },
        "disable_check_updates": True,
        "tuning": {"batch_change_delay": "10ms", "node_store_batch_timeout": "10ms"},  # else 800 and 500, at each step
        "logtail": {"enabled": False},
        "ephemeral_node_inactivity_timeout": f"{EPHEMERAL_GONE_AFTER_S}s",
        "database": {"type": "sqlite", "sqlite": {"path": str(folder / "db.sqlite"), "write_ahead_log": True}},
        "log": {"level": "info", "format": "text"},
        "policy": {"mode": "file", "path": str(folder / "policy.json")},
        "dns": {"magic_dns": True, "base_domain": DOMAIN, "override_local_dns": False, "nameservers": {"global": []}},
    }


def policy() -> dict[str, Any]:
    """Whoever is on the tailnet reaches machines and member, and of the operator's node only the positive control. Cattle
    reaches one port: where the operator's node listens when an orchestrator runs beside it. All reach cattle's sshd."""
    everybody = [TAG, "member@", "operator@"]
    destinations = [f"{TAG}:*", "member@:*", f"operator@:{CONTROL_PORT}", f"{CATTLE_TAG}:22"]
    return {
        "tagOwners": {TAG: ["operator@"], CATTLE_TAG: ["operator@"]},
        "acls": [
            {"action": "accept", "src": everybody, "dst": destinations},
            {"action": "accept", "src": [CATTLE_TAG], "dst": [f"operator@:{BOOTSTRAP_PORT}"]},
        ],
    }


def up_words(net: Addressing, hostname: str, key_file: str) -> list[str]:
    """What ``tailscale`` is told to join, the auth key in a file. No DNS and no packet filter of its own: the host's are."""
    words = ["up", f"--login-server={login_server(net)}", f"--hostname={hostname}", f"--auth-key=file:{key_file}"]
    return [*words, "--accept-dns=false", "--netfilter-mode=off", f"--timeout={_JOIN_TIMEOUT_S}s"]


def node_environment(certificate: Path) -> dict[str, str]:
    """What a tailscaled of the lab gets: should it ever turn to the public coordination server, it ends there."""
    return {
        "SSL_CERT_FILE": str(certificate),
        "TS_NO_LOGS_NO_SUPPORT": "true",
        "TS_PANIC_IF_HIT_MAIN_CONTROL": "true",
    }


class RealTailnet:
    """headscale, the operator's node and the member's, as children of the lab's process, in a control group of their own.

    ``folder`` (private) keeps keys and database, so that a lab that is mended finds its nodes again. ``path`` is the
    search path for ``ip``. They may outlive the lab's process; ``Group`` and ``Network.sweep`` find what was left.
    """

    def __init__(self, net: Addressing, programs: Programs, folder: Path, runner: Runner, *, path: str) -> None:
        self.net = net
        self._programs = programs
        self._folder = ensure_dir(folder)
        self._runner = runner
        self._path = path
        self._group = Group(f"{net.prefix}/tailnet")
        self._children: dict[str, Background] = {}
        self._versions = ""

    @property
    def certificate(self) -> Path:
        """What every node has to trust, by ``SSL_CERT_FILE``."""
        return self._folder / "cert.pem"

    def start(self) -> None:
        """Run everything, and return when the operator and the member are on the tailnet; LabError, CommandError.

        The lab's networks are up, with places for nodes. What was started is ended when it does not get that far.
        """
        self.stop()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the programs, also those of an earlier process of the lab. Keys and database stay."""
        self._group.signal(signal.SIGTERM)
        wait_until(lambda: not self._group.populated(), timeout_s=_STOP_TIMEOUT_S)
        self._group.kill()
        for child in self._children.values():
            child.wait()
        self._children.clear()
        self._group.remove()

    close = stop

    def mint(
        self,
        *,
        user: str = "operator",
        tags: Sequence[str] = (TAG,),
        ephemeral: bool = False,
        reusable: bool = True,
        expires_in_s: int = KEY_EXPIRES_IN_S,
    ) -> Secret:
        """A new auth key; CommandError. With headscale 0.28 a node that joined by an ephemeral one does not survive a
        reboot: it comes back as another, with other addresses. Hosts have a lasting one."""
        users = {found["name"]: found["id"] for found in self._headscale("users", "list") or []}
        words = ["preauthkeys", "create", "--user", str(users[user]), "--expiration", f"{expires_in_s}s"]
        words += [flag for flag, wanted in (("--ephemeral", ephemeral), ("--reusable", reusable)) if wanted]
        words += ["--tags", ",".join(tags)] if tags else []
        return Secret(self._headscale(*words)["key"], "tailnet auth key")

    def api_key(self) -> Secret:
        """A new key for headscale's own API; CommandError."""
        return Secret(str(self._headscale("apikeys", "create", "--expiration", "1h")), "headscale api key")

    def left(self, server_id: int) -> None:
        """A server is down, or reboots: its node is still one, and headscale sees by itself that it is not there."""

    def addresses(self, machines: Mapping[int, str]) -> dict[int, tuple[str, ...]]:
        """By id, the tailnet addresses of those of these machines (id to host name) that are online; CommandError.

        A machine that was made anew may have a forerunner of its name for a while: the younger node counts.
        """
        peers = sorted((self.status().get("Peer") or {}).values(), key=lambda peer: str(peer.get("Created")))
        online = {peer["HostName"]: tuple(peer["TailscaleIPs"]) for peer in peers if peer.get("Online")}
        return {server_id: online[name] for server_id, name in machines.items() if name in online}

    def status(self, known: frozenset[int] = frozenset()) -> dict[str, Any]:  # noqa: ARG002 - headscale knows them
        """``tailscale status --json`` of the operator's node; CommandError."""
        return dict(self._tailscale("operator", "status", "--json").check().json())

    def account(self) -> dict[str, Any]:
        """``{kind, works, evidence}``."""
        ended = [name for name, child in self._children.items() if child.poll() is not None]
        if ended:
            said = f"{', '.join(ended)} ended; see {self._folder / f'{ended[0]}.log'}"
            return {"kind": REAL, "works": False, "evidence": said}
        try:
            status = self.status()
        except CommandError as error:
            return {"kind": REAL, "works": False, "evidence": f"the operator's node does not answer: {error.what}"}
        peers = (status.get("Peer") or {}).values()
        online = sum(bool(peer.get("Online")) for peer in peers)
        said = f"{self._versions} at {login_server(self.net)}; the operator's node is {status['BackendState']}, "
        said += f"{online} of {len(peers)} other nodes are online"
        return {"kind": REAL, "works": status["BackendState"] == "Running", "evidence": said}

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes as headscale knows them."""
        return list(self._headscale("nodes", "list") or [])

    def expire(self, hostname: str, at: datetime | None = None) -> None:
        """Let the key of the node run out, at once or then; LabError when there is no such node."""
        for node in self.nodes():
            if node["given_name"] == hostname:
                then = ["--expiry", at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")] if at else []
                self._headscale("nodes", "expire", "--identifier", str(node["id"]), *then)
                return
        raise LabError("is not on the tailnet", where=hostname)

    # How it is done

    def _start(self) -> None:
        self._versions = self._programs.versions(self._runner)
        begun = self._folder / "begun"
        if not begun.exists():
            self._forget()
        self._make_certificate()
        write_atomic(self._folder / "headscale.json", json.dumps(settings(self.net, self._folder), indent=1) + "\n")
        write_atomic(self._folder / "policy.json", json.dumps(policy(), indent=1) + "\n")
        self._group.make()
        serve = [str(self._programs.headscale), "-c", str(self._folder / "headscale.json"), "serve"]
        self._spawn("headscale", self.net.internet_ns, serve)
        for name, namespace in zip(NODES, (self.net.tailnet_ns, self.net.member_ns), strict=True):
            self._spawn(name, namespace, self._node_argv(name))
        socket = self._folder / "headscale.sock"
        self._wait("headscale", lambda: socket.exists() and self._try_headscale("users", "list").ok)
        known = {user["name"] for user in self._headscale("users", "list") or []}
        for last, name in enumerate(NODES, 1):
            if name not in known:
                self._headscale("users", "create", name)
            self._join(name)
            addresses = tuple(self._own_status(name)["Self"]["TailscaleIPs"])
            if addresses != self.net.tailnet(last):
                raise LabError(
                    f"the {name}'s node is {' '.join(addresses)}, which the lab does not expect",
                    where="tailnet",
                    fix="clawdlets lab down, then up",
                )
        write_atomic(begun, "")

    def _forget(self) -> None:
        """A start that did not come to its end: killed while it makes its database, headscale 0.28 does not open it again."""
        for database in self._folder.glob("db.sqlite*"):
            database.unlink()
        for name in NODES:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _node_argv(self, name: str) -> list[str]:
        state = ensure_dir(self._folder / name)
        argv = [str(self._programs.tailscaled), "--no-logs-no-support", "--tun=tailscale0", "--port=41641"]
        return [*argv, f"--statedir={state}", f"--state={state / 'state'}", f"--socket={self._folder / f'{name}.sock'}"]

    def _join(self, name: str) -> None:
        self._wait(name, lambda: self._own_status(name).get("BackendState") in ("NeedsLogin", "Running", "Stopped"))
        if self._own_status(name)["BackendState"] == "Running":
            return
        key_file = self._folder / f"{name}.key"
        key = self.mint(user=name, tags=(), ephemeral=False, reusable=False, expires_in_s=600)
        write_atomic(key_file, key.reveal())
        try:
            self._tailscale(name, *up_words(self.net, name, str(key_file)), secrets=(key,)).check()
        finally:
            key_file.unlink()

    def _own_status(self, name: str) -> dict[str, Any]:
        """Of this node without its peers; nothing when it does not answer."""
        found = self._tailscale(name, "status", "--json", "--peers=false")
        try:
            return dict(found.json())
        except CommandError:
            return {}

    def _make_certificate(self) -> None:
        if self.certificate.exists():
            return
        address, new = self.net.outside(4)[0], self._folder / "cert.new"
        words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        words += ["-keyout", str(self._folder / "cert.key"), "-out", str(new), "-days", "365"]
        words += ["-subj", "/CN=the lab's tailnet", "-addext", f"subjectAltName=IP:{address}"]
        self._runner.run(Command(words, "make the tailnet's certificate", timeout_s=_COMMAND_TIMEOUT_S)).check()
        new.rename(self.certificate)  # last: where it is, the key is whole

    def _spawn(self, name: str, namespace: str, argv: list[str]) -> None:
        self._children[name] = spawn(
            self._group.enter_argv(["ip", "netns", "exec", namespace, *argv]),
            env={
                "PATH": self._path,
                "HOME": str(self._folder),
                "TS_LOGS_DIR": str(self._folder),  # else it makes /var/lib/tailscale on this machine
                **node_environment(self.certificate),
            },
            log_file=self._folder / f"{name}.log",
        )

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        child = self._children[name]
        if (
            not wait_until(lambda: child.poll() is not None or ready(), timeout_s=_START_TIMEOUT_S)
            or child.poll() is not None
        ):
            tail = read_private(self._folder / f"{name}.log")[-400:]
            raise LabError(f"{name} does not run: {tail}", where="tailnet", fix=f"see {self._folder / f'{name}.log'}")

    def _try_headscale(self, *words: str) -> Result:
        argv = ["ip", "netns", "exec", self.net.internet_ns, str(self._programs.headscale)]
        argv += ["-c", str(self._folder / "headscale.json"), "--output", "json", *words]
        return self._runner.run(Command(argv, "ask headscale", timeout_s=_COMMAND_TIMEOUT_S))

    def _headscale(self, *words: str) -> Any:
        return self._try_headscale(*words).check().json()

    def _tailscale(self, name: str, *words: str, secrets: Sequence[Secret] = ()) -> Result:
        argv = [str(self._programs.tailscale), f"--socket={self._folder / f'{name}.sock'}", *words]
        return self._runner.run(
            Command(argv, f"ask the node {name}", timeout_s=_JOIN_TIMEOUT_S + _COMMAND_TIMEOUT_S, secrets=secrets)
        )
