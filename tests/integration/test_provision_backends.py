"""OpenTofu's state in a shared place: a real PostgreSQL of this test's own, and what is rendered for the others."""

from __future__ import annotations

import base64
import json
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from clawdlets_ops import provision
from clawdlets_ops.errors import BusyError, CommandError
from clawdlets_ops.provision.state import CREDENTIALS
from clawdlets_ops.secrets.statekey import state_key
from tests.integration.provisioning import Site, site_in
from tests.serving import serving

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PASSWORD = "canary-database-password"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_in(tmp_path) as made:
        yield made


@dataclass
class Postgres:
    """A PostgreSQL of this test's own, on a unix socket in ``folder``."""

    programs: Path
    folder: Path

    def psql(self, statement: str) -> str:
        argv = [self.programs / "psql", "-h", self.folder, "-U", "clawdlets", "-d", "postgres", "-Atc", statement]
        env = {"PGPASSWORD": PASSWORD, "PATH": os.environ["PATH"]}
        return subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout.strip()

    def answers(self) -> bool:
        try:
            return self.psql("select 1") == "1"
        except subprocess.CalledProcessError:
            return False

    @property
    def variables(self) -> dict[str, str]:
        named = {"PGHOST": self.folder, "PGUSER": "clawdlets", "PGDATABASE": "postgres", "PGPASSWORD": PASSWORD}
        return {**{name: str(value) for name, value in named.items()}, "PGSSLMODE": "disable"}


def programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "")]
    if not found[-1].is_file():
        pytest.skip("PostgreSQL is missing (Debian package postgresql)")
    return found[-1].parent


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """Started as an unprivileged user, as it refuses to run as root; a socket's path is short, so not below tmp_path."""
    where = programs()
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    folder = Path(tempfile.mkdtemp(prefix="clf-pg-"))
    os.chown(folder, user.pw_uid, user.pw_gid)
    as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    password = folder / "password"
    password.write_text(PASSWORD)
    os.chown(password, user.pw_uid, user.pw_gid)
    data = folder / "data"
    made = [where / "initdb", "-D", data, "-U", "clawdlets", "-A", "scram-sha-256", f"--pwfile={password}", "--no-sync"]
    subprocess.run(made, env=env, cwd=folder, check=True, capture_output=True, **as_user)  # type: ignore[call-overload]
    argv = [where / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, env=env, cwd=folder, stdout=log, stderr=log, **as_user)  # type: ignore[call-overload]
    made_here = Postgres(where, folder)
    try:
        deadline = time.monotonic() + 60
        while not (folder / ".s.PGSQL.5432").exists() or not made_here.answers():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield made_here
    finally:
        process.terminate()
        process.wait(timeout=30)
        shutil.rmtree(folder)


def test_a_state_in_postgresql_is_encrypted_kept_and_shared(site: Site, postgres: Postgres) -> None:
    site.declare("alpha", state={"backend": "pg"})
    site.environ |= postgres.variables
    first = site.provision()
    stored = postgres.psql("select data from clawdlets_alpha.states")
    assert '"encrypted_data"' in stored
    assert "hcloud_server" not in stored
    assert not (site.folder() / "terraform.tfstate").exists()
    key = state_key(site.project(), runner=site.runner(), may_make=False).reveal()
    for path in [path for path in site.root.rglob("*") if path.is_file() and "providers" not in path.parts]:
        content = path.read_bytes()
        assert PASSWORD.encode() not in content, path
        assert key.encode() not in content, path
    # Another operator, in a checkout of their own, goes on with the same state; what was before is kept, sealed.
    shutil.rmtree(site.folder())
    site.layout.state_file("provision-alpha").unlink()
    site.declare("alpha", labels={"team": "bots"})
    assert site.provision().id == first.id
    assert not any("adopt" in said for said in site.said)
    [kept] = (site.folder() / "backups").iterdir()
    assert "ENC[AES256_GCM" in kept.read_text()
    assert "hcloud_server" not in kept.read_text()
    # A wrong password is said, and shown to nobody.
    site.environ["PGPASSWORD"] = "canary-wrong-password"
    site.declare("alpha", labels={})
    with pytest.raises(CommandError, match="password authentication failed") as caught:
        site.provision()
    assert "canary-wrong-password" not in str(caught.value)


def test_two_operators_at_once_on_postgresql(site: Site, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    site.declare("alpha", state={"backend": "pg"})
    site.environ |= postgres.variables
    site.provision()
    site.declare("alpha", labels={"team": "bots"})
    # The first is in the middle of an apply, in another checkout: no lock of this machine keeps the second away.
    site.fault("slow PUT /servers/* seconds=600")
    project = site.project()
    tofu = provision.state.open_tofu(project, "alpha", runner=site.runner())
    planned = site.plan()
    provision.applying.prepare(project, "alpha", tofu, planned.config, planned.adopt)
    tofu.plan()
    other = site.root / "other"
    shutil.copytree(site.folder(), other, symlinks=True)
    env = {**site.environ, "TF_ENCRYPTION": tofu._env["TF_ENCRYPTION"].reveal(), "TF_IN_AUTOMATION": "1"}  # type: ignore[union-attr]
    first = subprocess.Popen(
        ["tofu", "apply", "-no-color", "plan.bin"], cwd=other, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not any(entry.hits for entry in site.book.all()):
            assert time.monotonic() < deadline, "the first operator's apply has not begun"
            time.sleep(0.02)
        monkeypatch.setattr("clawdlets_ops.tofu.STATE_LOCK_WAIT_S", 1)
        with pytest.raises(BusyError, match="somebody else works on this state"):
            site.provision()
        site.book.clear(None)
        assert "Apply complete" in first.communicate(timeout=60)[0]
    finally:
        first.kill()
        first.wait()
    # A plan that was made before the first one's apply is not applied any more.
    shutil.copy(other / "plan.bin", site.folder() / "plan.bin")
    with pytest.raises(CommandError, match="somebody else changed the state"):
        tofu.apply()
    site.provision()
    assert len(site.rows("servers")) == 1
    assert site.plan().empty


class StandInStateServer(BaseHTTPRequestHandler):
    """A stand-in for an HTTP state server, in memory: GET, POST, LOCK and UNLOCK, behind a user name and password."""

    states: ClassVar[dict[str, bytes]] = {}
    locks: ClassVar[dict[str, bytes]] = {}
    refused: ClassVar[list[str]] = []

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_one(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        expected = base64.b64encode(f"clawdlets:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {expected}":
            self.refused.append(path)
            self.answer(401)
        elif self.command == "GET":
            self.answer(200, self.states[path]) if path in self.states else self.answer(404)
        elif self.command == "POST":
            self.states[path] = body
            self.answer(200)
        elif self.command == "LOCK" and path in self.locks:
            self.answer(423, self.locks[path])
        elif self.command == "LOCK":
            self.locks[path] = body
            self.answer(200)
        else:
            self.locks.pop(path, None)
            self.answer(200)

    do_GET = do_POST = do_LOCK = do_UNLOCK = handle_one

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_a_state_behind_http_is_encrypted_and_its_lock_says_who(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), StandInStateServer)) as server:
        site.environ |= {"TF_HTTP_USERNAME": "clawdlets", "TF_HTTP_PASSWORD": PASSWORD}
        site.declare(state={"backend": "http", "address": f"http://127.0.0.1:{server.server_port}/fleet"})
        site.provision()
        assert StandInStateServer.refused == []
        assert b'"encrypted_data"' in StandInStateServer.states["/fleet/alpha"]
        assert b"hcloud_server" not in StandInStateServer.states["/fleet/alpha"]
        assert StandInStateServer.locks == {}
        held = {"ID": "0f3a", "Operation": "OperationTypeApply", "Who": "maren@desk", "Created": "2026-11-22T22:30:44Z"}
        StandInStateServer.locks["/fleet/alpha/lock"] = json.dumps(held).encode()
        monkeypatch.setattr("clawdlets_ops.tofu.STATE_LOCK_WAIT_S", 1)
        with pytest.raises(BusyError, match="maren@desk since 2026-11-22"):
            site.provision(refresh=True)


@pytest.mark.parametrize(
    ("state", "block"),
    [
        ({"backend": "local"}, {}),
        ({"backend": "pg", "schemaPrefix": "fleet"}, {"pg": {"schema_name": "fleet_be_ta"}}),
        (
            {"backend": "http", "address": "https://state.example.org/fleet/"},
            {
                "http": {
                    "address": "https://state.example.org/fleet/be-ta",
                    "lock_address": "https://state.example.org/fleet/be-ta/lock",
                    "unlock_address": "https://state.example.org/fleet/be-ta/lock",
                    "lock_method": "LOCK",
                    "unlock_method": "UNLOCK",
                }
            },
        ),
        (
            {"backend": "s3", "bucket": "fleet-state"},
            {
                "s3": {
                    "bucket": "fleet-state",
                    "key": "clawdlets/be-ta.tfstate",
                    "region": "us-east-1",
                    "use_lockfile": True,
                }
            },
        ),
    ],
)
def test_a_backend_is_rendered_without_credentials(site: Site, state: dict[str, str], block: dict[str, object]) -> None:
    site.declare("be-ta", state=state)
    site.environ |= {name: f"canary-{name}" for names in CREDENTIALS.values() for name in names}
    rendered = provision.render.backend(site.project().fleet, "be-ta")
    assert rendered == block
    assert "canary" not in str(rendered)
    assert set(provision.state.credentials(site.project())) <= {
        name for names in CREDENTIALS.values() for name in names
    }


def test_something_that_only_speaks_like_s3_is_not_taken_for_amazon(site: Site) -> None:
    site.declare(state={"backend": "s3", "bucket": "fleet-state", "endpoint": "https://objects.example.org"})
    rendered = provision.render.backend(site.project().fleet, "alpha")["s3"]
    assert rendered["endpoints"] == {"s3": "https://objects.example.org"}
    assert rendered["skip_metadata_api_check"] is True
