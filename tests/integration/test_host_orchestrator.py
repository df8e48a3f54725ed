"""What the lab's host profile holds of the orchestrator: the copied distributions are enough to run it, and nothing is laid down
where it is not declared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clawdlets_ops.cattle import personas, wiring
from clawdlets_ops.errors import OrchestratorError
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.lab import host_orchestrator
from clawdlets_ops.orchestrator.daemon import Config, Parts, read_config
from clawdlets_ops.orchestrator.queue import Queue
from clawdlets_ops.orchestrator.store import open_sqlite
from clawdlets_ops.orchestrator.tokens import Tokens
from clawdlets_ops.orchestrator.vending import SecretFiles
from tests.contract.test_nix_fleet import WHOLE
from tests.egress_fleet import host_in

pytestmark = pytest.mark.integration

RUN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from clawdlets_ops.{module} import main; main()"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    for name, source in host_orchestrator.bundle().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(source)
    return folder


def run(bundle: Path, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The program from the bundle and the standard library alone: -I and -S keep everything else out of its path."""
    argv = [sys._base_executable, "-I", "-S", "-B", "-c", RUN.format(module=module), str(bundle), *words]  # type: ignore[attr-defined]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


def test_the_bundle_is_enough_for_both_programs(bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"database": str(state / "state.sqlite")}))
    done = run(bundle, "clf_orchestrator", "--config", str(config), "--check")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    done = run(bundle, "clf", "jobs", "--help")
    assert done.returncode == 0, done.stderr


def test_a_bundle_that_lacks_one_would_be_noticed(bundle: Path, tmp_path: Path) -> None:
    less = tmp_path / "less"
    less.mkdir()
    for path in bundle.iterdir():
        if path.name != "pyrage":
            (less / path.name).symlink_to(path)
    done = run(less, "clf_orchestrator", "--help")
    assert done.returncode == 1
    assert "No module named 'pyrage'" in done.stderr


def test_nothing_is_laid_down_where_it_is_not_declared() -> None:
    fleet = parse_fleet(json.dumps(WHOLE))
    assert host_orchestrator.orchestrator_files(fleet, "beta", "programs", personas=Path("none"), keys=[]) == {}
    assert host_orchestrator.cattle_files(fleet, "beta", Path("none")) == {}


def test_an_orchestrator_whose_cattle_is_switched_off_learns_of_it_and_goes_on_reaping(tmp_path: Path) -> None:
    fleet = parse_fleet(json.dumps({**WHOLE, "cattle": {**WHOLE["cattle"], "enabled": False}}))
    ((name, (_, content)),) = host_orchestrator.cattle_files(fleet, "alpha", Path("none")).items()
    assert name == "etc/clf/cattle.json"
    (tmp_path / "cattle.json").write_bytes(content)
    document = host_orchestrator.config_of(fleet.host("alpha").orchestrator, [])
    (tmp_path / "config.json").write_text(json.dumps({**document, "cattleFile": str(tmp_path / "cattle.json")}))
    config = read_config(tmp_path / "config.json")
    assert (config.cattle.enabled, config.cattle.host) == (False, "alpha")
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "secrets").mkdir()
    store = open_sqlite(tmp_path / "state" / "state.sqlite")
    try:
        queue, tokens = Queue(store, lambda: 0), Tokens(store, lambda: 0)
        parts = Parts(config, queue, tokens, SecretFiles([tmp_path / "secrets"]), lambda: 0, lambda: "")
        assert wiring.make_work(parts).kinds == ()  # without its token it can do nothing
        (tmp_path / "secrets" / "hcloud_token").write_text("canary-token")
        work = wiring.make_work(parts)
    finally:
        store.close()
    assert [kind.name for kind in work.kinds] == ["cattle.spawn", "cattle.reap"]
    assert work.kinds[0].validate({}, "maren")[0].message == "cattle is not enabled"
    assert work.periodic == {"cattle.reap": wiring.REAP_EVERY_S}


def test_what_is_declared_of_cattle_is_laid_down_and_read_by_the_daemon(tmp_path: Path) -> None:
    fleet = parse_fleet(json.dumps(WHOLE))
    persona = tmp_path / "personas" / "rex"
    persona.mkdir(parents=True)
    (persona / "run").write_text("#!/bin/sh\n")
    (persona / "run").chmod(0o755)
    (persona / "SOUL.md").write_text("calm\n")
    files = host_orchestrator.cattle_files(fleet, "alpha", tmp_path / "personas")
    assert files["etc/clawdlets/tailnet-ports"] == (0o444, b"18337\n")
    for name, (mode, content) in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
    config = tmp_path / "orchestrator.json"
    document = {
        **host_orchestrator.config_of(fleet.host("alpha").orchestrator, ["ssh-ed25519 AAAA olive"]),
        "cattleFile": str(tmp_path / "etc/clf/cattle.json"),
        "personas": str(tmp_path / "etc/clf/cattle-personas"),
    }
    config.write_text(json.dumps(document))
    read = read_config(config)
    assert read.cattle == fleet.cattle
    assert read.authorized_keys == ("ssh-ed25519 AAAA olive",)
    found = personas.read(Path(read.personas), "rex")
    assert [(file.name, file.executable) for file in found] == [("SOUL.md", False), ("run", True)]


def test_what_is_said_of_cattle_wins_and_a_wrong_file_is_told(tmp_path: Path) -> None:
    declared, config = tmp_path / "cattle.json", tmp_path / "config.json"
    declared.write_text('{"enabled": true}')
    config.write_text(json.dumps({"cattleFile": str(declared)}))
    with pytest.raises(OrchestratorError, match=r"host is not named") as wrong:
        read_config(config)
    assert wrong.value.where == str(declared)
    config.write_text(json.dumps({"cattleFile": str(declared), "cattle": {"maxInstances": 7}}))
    assert read_config(config).cattle.max_instances == 7
    declared.unlink()
    config.write_text(json.dumps({"cattleFile": str(declared)}))
    assert read_config(config).cattle.enabled is False


def test_what_is_laid_down_is_what_the_daemon_reads_and_systemd_needs() -> None:
    host = host_in("smtp-only", {"maren": {}})
    on = host.orchestrator.model_copy(update={"enable": True, "bootstrap_port": 18400})
    config = Config.model_validate_json(json.dumps(host_orchestrator.config_of(on)))
    assert config.bootstrap is not None
    assert (config.bootstrap.port, config.store, config.workers) == (18400, "sqlite", 2)
    units = host_orchestrator.units(host.model_copy(update={"orchestrator": on}))
    socket = units["etc/systemd/system/clf-orchestrator.socket"]
    assert {"ListenStream=/run/clf/orchestrator.sock", "SocketGroup=clf-bots", "SocketMode=0660"} <= set(
        socket.splitlines()
    )
    service = units["etc/systemd/system/clf-orchestrator.service"].splitlines()
    assert {"User=clf-orchestrator", "StateDirectoryMode=0700", "NoNewPrivileges=true", "UMask=0077"} <= set(service)
    assert [line for line in service if line.startswith("SystemCallFilter=")] == [
        "SystemCallFilter=@system-service",
        "SystemCallFilter=~@privileged",
    ]
    assert "m bot-maren clf-bots - - -" in units["etc/clf/users.conf"].splitlines()
    assert units["etc/clf/folders.conf"] == "d /run/clf 0750 root clf-bots -\n"
