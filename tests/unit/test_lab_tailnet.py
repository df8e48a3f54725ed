"""Which tailnet a lab has, and what a host is given to join it."""

from __future__ import annotations

from pathlib import Path

import pytest

from clawdlets_ops.errors import LabError
from clawdlets_ops.lab import headscale
from clawdlets_ops.lab.addressing import Addressing
from clawdlets_ops.lab.headscale import AUTO, REAL, STAND_IN, choose, node_environment, settings, up_words
from clawdlets_ops.lab.host_tailnet import host_files
from clawdlets_ops.lab.registry import LabRecord, read_record
from clawdlets_ops.layout import Layout

NET = Addressing(7)
PROGRAMS = "nix/store/abc/sw/bin"


def build(tools: Path) -> Path:
    """What ``make tailnet`` leaves."""
    for name in ("bin/headscale", "bin/tailscaled", "tailnet/tailscale"):
        (tools / name).parent.mkdir(parents=True, exist_ok=True)
        (tools / name).write_bytes(b"program")
    return tools


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A search path with openssl, on a machine with TUN devices."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "openssl").touch(mode=0o755)
    monkeypatch.setattr(headscale, "_TUN", tmp_path)
    return str(tmp_path / "path")


def test_auto_is_the_real_one_where_it_is_built_and_either_may_be_named(tmp_path: Path, path: str) -> None:
    tools = build(tmp_path / "tools")
    chosen = [choose(wanted, tools, Path("/run/tailnet"), path) for wanted in (AUTO, REAL, STAND_IN)]
    assert chosen == [REAL, REAL, STAND_IN]


@pytest.mark.parametrize("lacking", ["headscale", "openssl", "tun", "short path"])
def test_without_what_it_needs_auto_is_the_stand_in_and_the_real_one_is_refused(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    tools, folder = build(tmp_path / "tools"), Path("/run/tailnet")
    match lacking:
        case "headscale":
            (tools / "bin" / "headscale").unlink()
        case "openssl":
            path = str(tmp_path)
        case "tun":
            monkeypatch.setattr(headscale, "_TUN", tmp_path / "none")
        case _:
            folder = Path("/run") / ("x" * 90)
    assert choose(AUTO, tools, folder, path) == STAND_IN
    with pytest.raises(LabError) as refused:
        choose(REAL, tools, folder, path)
    assert refused.value.fix


def lab(root: Path, tailnet: str) -> LabRecord:
    record = LabRecord(7, root, "/bin", tailnet=tailnet)
    (record.lab_dir / "tailnet").mkdir(parents=True)
    record.write()
    (record.lab_dir / "tailnet" / "cert.pem").write_text("certificate")
    return record


def test_what_a_lab_began_with_is_on_record(tmp_path: Path) -> None:
    for name, control in ((REAL, "https://198.19.7.4"), (STAND_IN, "http://198.19.7.4:8080")):
        record = lab(tmp_path / name, name)
        assert read_record(record.lab_dir) == record
        assert record.tailnet_control == control


def test_a_host_on_the_real_one_gets_the_program_its_unit_and_the_certificate_and_no_key(tmp_path: Path) -> None:
    record = lab(tmp_path, REAL)
    build(Layout(tmp_path).cache / "tools")
    files = host_files(record.lab_dir, "alpha", PROGRAMS)
    assert files[f"{PROGRAMS}/tailscaled"] == (0o555, b"program")
    assert files["etc/clawdlets/tailnet.pem"] == (0o644, b"certificate")
    daemon = files["etc/systemd/system/tailscaled.service"][1].decode()
    for key, value in node_environment(Path("/etc/clawdlets/tailnet.pem")).items():
        assert f"Environment={key}={value}\n" in daemon
    assert "StateDirectory=tailscale\n" in daemon  # what makes it the same node after a reboot
    join = files["etc/systemd/system/tailscaled-autoconnect.service"][1].decode()
    assert " ".join(up_words(NET, "alpha", "/run/secrets/tailscale_auth_key")) in join
    assert "Wants=tailscaled.service\n" in join


def test_a_host_on_the_stand_in_gets_one_program_and_is_told_where_to_join(tmp_path: Path) -> None:
    files = host_files(lab(tmp_path, STAND_IN).lab_dir, "alpha", PROGRAMS)
    assert set(files) == {f"{PROGRAMS}/clawdlets-join", "etc/systemd/system/tailscaled-autoconnect.service"}
    unit = files["etc/systemd/system/tailscaled-autoconnect.service"][1].decode()
    assert "clawdlets-join http://198.19.7.4:8080\n" in unit


def test_without_a_lab_or_its_programs_a_host_gets_nothing(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="there is no lab"):
        host_files(tmp_path, "alpha", PROGRAMS)
    with pytest.raises(LabError, match="are gone") as gone:
        host_files(lab(tmp_path, REAL).lab_dir, "alpha", PROGRAMS)
    assert gone.value.fix == "make tailnet"


def test_headscale_is_told_of_nothing_outside_of_the_lab(tmp_path: Path) -> None:
    told = settings(NET, tmp_path)
    assert told["derp"]["urls"] == told["derp"]["paths"] == told["dns"]["nameservers"]["global"] == []
    assert told["logtail"] == {"enabled": False}
    assert told["disable_check_updates"] is True
    assert (told["listen_addr"], told["server_url"]) == ("198.19.7.4:443", "https://198.19.7.4")
