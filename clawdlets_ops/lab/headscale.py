"""The lab's tailnet made of the real programs: headscale, and a tailscaled for each node, in the lab's own namespaces.

headscale stands at the tailnet control server's address: coordination and DERP on port 443, STUN on 3478. TLS with a
certificate of its own, as tailscaled falls back to HTTPS whenever it has to connect twice in two minutes. The operator's
node lives in the tailnet's namespace, the member's in its own; each has a leg to the internet for its WireGuard packets.
The root namespace is no node: tailscaled would put its rules and routes beside those of a Tailscale that the operator may
really have. It reaches the tailnet through the operator's node, with that node's address. Nothing here knows an address
outside of the lab: no public DERP map, no log, update or coordination server.

Source of the settings: headscale's config-example.yaml (0.28), ``tailscaled --help`` (1.94).
"""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from clawdlets_ops.errors import CommandError, LabError
from clawdlets_ops.files import ensure_dir, read_private, write_atomic
from clawdlets_ops.lab.addressing import Addressing, Batch
from clawdlets_ops.lab.processes import ProcessId, wait_until
from clawdlets_ops.process import Background, Command, Result, Runner, spawn
from clawdlets_ops.sensitive import Secret

log = logging.getLogger(__name__)

DOMAIN: Final = "lab.internal"
TAG: Final = "tag:clawdlets"
STUN_PORT: Final = 3478
CONTROL_PORT: Final = 443
KEY_EXPIRES_IN_S: Final = 90 * 24 * 3600
EPHEMERAL_GONE_AFTER_S: Final = 70  # headscale refuses 65 and less
NODES: Final = {"operator": 5, "member": 6}  # name (and user) of a node of the lab's own: where it is on the internet

_START_TIMEOUT_S = 20.0
_COMMAND_TIMEOUT_S = 30.0
_JOIN_TIMEOUT_S = 45
_SOCKET_PATH_CHARS = 107  # unix(7)


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


def login_server(net: Addressing) -> str:
    """What a node is told with ``--login-server``."""
    return f"https://{net.outside(4)[0]}"


def settings(net: Addressing, folder: Path) -> dict[str, Any]:
    """headscale's configuration: everything at one address of the lab, and nothing that leads out of it."""
    address = net.outside(4)[0]
    return {
        "server_url": login_server(net),
        "listen_addr": f"{address}:{CONTROL_PORT}",
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
            },
            "urls": [],
            "paths": [],
            "auto_update_enabled": False,
        },
        "disable_check_updates": True,
        "logtail": {"enabled": False},
        "ephemeral_node_inactivity_timeout": f"{EPHEMERAL_GONE_AFTER_S}s",
        "database": {"type": "sqlite", "sqlite": {"path": str(folder / "db.sqlite"), "write_ahead_log": True}},
        "log": {"level": "info", "format": "text"},
        "policy": {"mode": "file", "path": str(folder / "policy.json")},
        "dns": {"magic_dns": True, "base_domain": DOMAIN, "override_local_dns": False, "nameservers": {"global": []}},
    }


def policy(control_port: int) -> dict[str, Any]:
    """Whoever is on the tailnet reaches machines and member; of the operator's node only the positive control."""
    destinations = [f"{TAG}:*", "member@:*", f"operator@:{control_port}"]
    return {
        "tagOwners": {TAG: ["operator@"]},
        "acls": [{"action": "accept", "src": ["*"], "dst": destinations}],
    }


def up_words(net: Addressing, hostname: str, key_file: str) -> list[str]:
    """What ``tailscale`` is told to join, the auth key in a file. No DNS and no packet filter of its own: the host's are."""
    words = ["up", f"--login-server={login_server(net)}", f"--hostname={hostname}", f"--auth-key=file:{key_file}"]
    return [*words, "--accept-dns=false", "--netfilter-mode=off", f"--timeout={_JOIN_TIMEOUT_S}s"]


def plan_nodes(net: Addressing) -> list[Batch]:
    """From the stand-in's second network to two places for real nodes: its bridge goes, legs to the internet come."""
    (op4, op6), (_, leg), (old4, old6) = net.operator, net.operator_legs, net.tailnet(1)
    v4, v6 = f"100.64.{net.number}.0/24", f"fd7a:115c:a1e0:{net.number:x}::/64"
    batches = [
        Batch(
            net.tailnet_ns,
            (
                "link delete mem",
                "link delete br0",
                "address add 172.31.1.2/32 dev op",
                "address add fe80::2/64 dev op nodad",
                f"route add {op4}/32 dev op",
                f"route add {op6}/128 via fe80::1 dev op",
            ),
        ),
        Batch(
            None,
            (
                f"address delete {old4}/24 dev {leg}",
                f"address delete {old6}/64 dev {leg}",
                f"route add {v4} via 172.31.1.2 dev {leg} onlink src {op4}",
                f"route add {v6} via fe80::2 dev {leg} src {op6}",
            ),
        ),
    ]
    for (name, last), namespace in zip(NODES.items(), (net.tailnet_ns, net.member_ns), strict=True):
        ipv4, ipv6 = net.outside(last)
        near = f"n-{name}"
        batches += [
            Batch(
                net.internet_ns,
                (
                    f"link add {near} type veth peer name eth0 netns {namespace}",
                    f"link set {near} addrgenmode none",
                    f"link set {near} up",
                    f"address add 172.31.1.1/32 dev {near}",
                    f"address add fe80::1/64 dev {near} nodad",
                    f"route add {ipv4}/32 dev {near}",
                    f"route add {ipv6}/128 dev {near}",
                ),
            ),
            Batch(
                namespace,
                (
                    "link set eth0 addrgenmode none",
                    "link set eth0 up",
                    "address add fe80::3/64 dev eth0 nodad",
                    f"address add {ipv4}/32 dev eth0",
                    f"address add {ipv6}/128 dev eth0 nodad",
                    "route add default via 172.31.1.1 dev eth0 onlink",
                    "route add ::/0 via fe80::1 dev eth0",
                ),
            ),
        ]
    return batches


def render_operator() -> str:
    """The operator's node carries what the root namespace sends, with its own address, and lets nobody in to it."""
    return """table inet operator
delete table inet operator
table inet operator {
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "op" oifname "tailscale0" accept
  }
  chain postrouting {
    type nat hook postrouting priority 100;
    oifname "tailscale0" masquerade
  }
}
"""


class RealTailnet:
    """headscale, the operator's node and the member's, as children of the lab's process; they may outlive it.

    ``folder`` (private) keeps keys and database, so that a lab that is mended finds its nodes again. ``path`` is the
    search path for ``ip``. All of them run inside the lab's namespaces, where ``Network.sweep`` finds what was left.
    """

    def __init__(self, net: Addressing, programs: Programs, folder: Path, runner: Runner, *, path: str) -> None:
        self.net = net
        self._programs = programs
        self._folder = ensure_dir(folder)
        self._runner = runner
        self._path = path
        self._children: dict[str, Background] = {}

    @property
    def socket(self) -> Path:
        """The operator's node: what ``tailscale --socket`` is given."""
        return self._folder / "operator.sock"

    @property
    def certificate(self) -> Path:
        """What every node has to trust, by ``SSL_CERT_FILE``."""
        return self._folder / "cert.pem"

    def start(self, *, control_port: int = 4242) -> None:
        """Run everything, and return when the operator and the member are on the tailnet; LabError, CommandError.

        The lab's networks are up, and ``plan_nodes`` and ``render_operator`` are in force.
        """
        if len(str(self._folder / "headscale.sock")) > _SOCKET_PATH_CHARS:
            raise LabError("the path is too long for a socket", where=str(self._folder), fix="use a shorter path")
        self.stop()
        self._make_certificate()
        write_atomic(self._folder / "headscale.json", json.dumps(settings(self.net, self._folder), indent=1) + "\n")
        write_atomic(self._folder / "policy.json", json.dumps(policy(control_port), indent=1) + "\n")
        serve = [str(self._programs.headscale), "-c", str(self._folder / "headscale.json"), "serve"]
        self._spawn("headscale", self.net.internet_ns, serve)
        self._wait("headscale", lambda: self._try_headscale("users", "list").ok)
        known = {user["name"] for user in self._headscale("users", "list") or []}
        for name in NODES:
            if name not in known:
                self._headscale("users", "create", name)
            self._start_node(name)

    def stop(self) -> None:
        """End the programs, also those of an earlier process of the lab. Keys and database stay."""
        for child in self._children.values():
            child.terminate()
        self._children.clear()
        for file in self._folder.glob("*.pid"):
            process = ProcessId(*json.loads(file.read_text()))
            process.signal(signal.SIGKILL)
            wait_until(lambda found=process: not found.alive(), timeout_s=5.0)  # type: ignore[misc]
            file.unlink()

    def mint(
        self,
        *,
        user: str = "operator",
        tags: Sequence[str] = (TAG,),
        ephemeral: bool = True,
        reusable: bool = True,
        expires_in_s: int = KEY_EXPIRES_IN_S,
    ) -> Secret:
        """A new auth key; CommandError."""
        users = {found["name"]: found["id"] for found in self._headscale("users", "list") or []}
        words = ["preauthkeys", "create", "--user", str(users[user]), "--expiration", f"{expires_in_s}s"]
        words += [flag for flag, wanted in (("--ephemeral", ephemeral), ("--reusable", reusable)) if wanted]
        words += ["--tags", ",".join(tags)] if tags else []
        return Secret(self._headscale(*words)["key"], "tailnet auth key")

    def status(self) -> dict[str, Any]:
        """``tailscale status --json`` of the operator's node; CommandError."""
        return dict(self._tailscale("operator", "status", "--json").check().json())

    def addresses(self, hostname: str) -> tuple[str, ...]:
        """The tailnet addresses of the online peer of this host name, none when there is no such peer; CommandError."""
        for peer in (self.status().get("Peer") or {}).values():
            if peer["HostName"] == hostname and peer.get("Online"):
                return tuple(peer["TailscaleIPs"])
        return ()

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

    def node_environment(self) -> Mapping[str, str]:
        """What a tailscaled of the lab gets: should it ever turn to the public coordination server, it ends there."""
        return {
            "SSL_CERT_FILE": str(self.certificate),
            "TS_NO_LOGS_NO_SUPPORT": "true",
            "TS_PANIC_IF_HIT_MAIN_CONTROL": "true",
        }

    def _start_node(self, name: str) -> None:
        namespace = dict(zip(NODES, (self.net.tailnet_ns, self.net.member_ns), strict=True))[name]
        state = ensure_dir(self._folder / name)
        argv = [str(self._programs.tailscaled), "--no-logs-no-support", "--tun=tailscale0", "--port=41641"]
        argv += [f"--statedir={state}", f"--state={state / 'state'}", f"--socket={self._folder / f'{name}.sock'}"]
        self._spawn(name, namespace, argv)
        self._wait(name, lambda: self._state(name) in ("NeedsLogin", "Running", "Stopped"))
        if self._state(name) == "Running":
            return
        key_file = self._folder / f"{name}.key"
        key = self.mint(user=name, tags=(), ephemeral=False, reusable=False, expires_in_s=600)
        write_atomic(key_file, key.reveal())
        try:
            self._tailscale(name, *up_words(self.net, name, str(key_file)), secrets=(key,)).check()
        finally:
            key_file.unlink()

    def _state(self, name: str) -> str:
        found = self._tailscale(name, "status", "--json", "--peers=false")
        try:
            return str(found.json()["BackendState"])
        except CommandError:
            return ""

    def _make_certificate(self) -> None:
        if self.certificate.exists():
            return
        address = self.net.outside(4)[0]
        words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        words += ["-keyout", str(self._folder / "cert.key"), "-out", str(self.certificate), "-days", "365"]
        words += ["-subj", "/CN=the lab's tailnet", "-addext", f"subjectAltName=IP:{address}"]
        self._runner.run(Command(words, "make the tailnet's certificate", timeout_s=_COMMAND_TIMEOUT_S)).check()

    def _spawn(self, name: str, namespace: str, argv: list[str]) -> None:
        child = spawn(
            ["ip", "netns", "exec", namespace, *argv],
            env={"PATH": self._path, "HOME": str(self._folder), **self.node_environment()},
            log_file=self._folder / f"{name}.log",
        )
        self._children[name] = child
        if process := ProcessId.of(child.pid):
            write_atomic(self._folder / f"{name}.pid", json.dumps([process.pid, process.start_ticks]))

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        child = self._children[name]
        if not wait_until(lambda: child.poll() is not None or ready(), timeout_s=_START_TIMEOUT_S) or child.poll():
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
