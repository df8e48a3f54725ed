import json
from pathlib import Path

import pytest

from clawdlets_ops import ssh
from clawdlets_ops.errors import CommandError, HostKeyError, InstallRefused, SettingsError, UnreachableError
from clawdlets_ops.fleet import parse_fleet
from clawdlets_ops.install import Seen, TargetState, classify, flake_reference, plan, refuse_unsuitable, resume_phases
from clawdlets_ops.nixos_anywhere import PHASES, InstallSpec, install_command, run_phase
from clawdlets_ops.testing import FakeRunner

PIN = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s"
FRESH = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
OTHER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB"
KEY_LINE = PIN + " canary@example"
DEBIAN = 'ID=debian\nVERSION_ID="12"\n'
INSTALLER = 'ID=nixos\nVARIANT_ID="installer"\n'


@pytest.mark.parametrize(
    ("key", "pin", "installer_pin", "state"),
    [
        (PIN, PIN, None, TargetState.INSTALLED),
        (PIN, PIN, FRESH, TargetState.INSTALLED),
        (FRESH, PIN, FRESH, TargetState.FRESH),
        (FRESH, PIN, None, TargetState.FRESH),
        (OTHER, PIN, FRESH, TargetState.STRANGER),
        (None, PIN, FRESH, TargetState.UNKNOWN),
        (FRESH, None, None, TargetState.FRESH),
    ],
)
def test_a_target_is_what_its_key_says(
    key: str | None, pin: str | None, installer_pin: str | None, state: TargetState
) -> None:
    assert classify(key, pin=pin, installer_pin=installer_pin) is state


def test_an_installed_host_has_nothing_to_install_and_an_absent_one_everything() -> None:
    assert plan("alpha", Seen(TargetState.INSTALLED)).empty
    assert plan("alpha", Seen(TargetState.ABSENT)).phases == PHASES
    assert plan("alpha", Seen(TargetState.FRESH)).phases == PHASES


def test_a_stranger_and_a_silent_locked_host_are_refused() -> None:
    with pytest.raises(HostKeyError, match=ssh.fingerprint(OTHER)[:20].replace("+", r"\+")):
        plan("alpha", Seen(TargetState.STRANGER, "198.51.100.7", OTHER))
    with pytest.raises(UnreachableError, match="does not answer over the tailnet"):
        plan("alpha", Seen(TargetState.UNKNOWN), edge_open=False)


def test_a_silent_server_with_an_open_edge_is_waited_for() -> None:
    assert not plan("alpha", Seen(TargetState.UNKNOWN), edge_open=True).empty


@pytest.mark.parametrize(
    ("os_release", "mounted", "laid", "phases"),
    [
        (DEBIAN, False, False, ("kexec", "disko", "install", "reboot")),
        (DEBIAN, True, True, ("kexec", "disko", "install", "reboot")),
        (INSTALLER, False, False, ("disko", "install", "reboot")),
        (INSTALLER, True, False, ("install", "reboot")),
        (INSTALLER, True, True, ("install", "reboot")),
    ],
)
def test_an_installation_goes_on_where_the_target_stands(
    os_release: str, phases: tuple[str, ...], *, mounted: bool, laid: bool
) -> None:
    assert resume_phases(os_release, mounted=mounted, system_laid=laid) == phases


def declared(system: str = "x86_64-linux"):
    host = {"system": system, "provisioning": {"adminCidrs": ["203.0.113.0/24"]}, "sshAuthorizedKeys": [KEY_LINE]}
    return parse_fleet(json.dumps({"schemaVersion": 1, "hosts": {"alpha": host}})).host("alpha")


def test_an_installed_system_and_a_wrong_architecture_are_never_formatted() -> None:
    refuse_unsuitable("alpha", declared(), machine="x86_64", os_release=DEBIAN)
    refuse_unsuitable("alpha", declared(), machine="x86_64", os_release=INSTALLER)
    with pytest.raises(InstallRefused, match="reinstall=alpha"):
        refuse_unsuitable("alpha", declared(), machine="x86_64", os_release='ID=nixos\nVERSION_ID="25.05"\n')
    with pytest.raises(InstallRefused, match="aarch64"):
        refuse_unsuitable("alpha", declared(), machine="aarch64", os_release=DEBIAN)


def test_only_a_git_checkout_becomes_a_flake_reference(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="private keys included"):
        flake_reference(tmp_path, "alpha")
    (tmp_path / ".git").mkdir()
    assert flake_reference(tmp_path, "alpha") == f"git+file://{tmp_path}#alpha"


def spec(tmp_path: Path, address: str = "198.51.100.7") -> InstallSpec:
    return InstallSpec("git+file:///p#alpha", address, Path("/k/id"), Path("/p/extra"), tmp_path / "shim")


def test_the_command_line_of_a_phase(tmp_path: Path) -> None:
    assert install_command(spec(tmp_path), "disko") == [
        "nixos-anywhere", "--flake", "git+file:///p#alpha", "--target-host", "root@198.51.100.7",
        "-i", "/k/id", "--extra-files", "/p/extra", "--phases", "disko",
    ]  # fmt: skip
    assert "root@[2001:db8::1]" in install_command(spec(tmp_path, "2001:db8::1"), "kexec")
    with pytest.raises(ValueError, match="no phase 'format'"):
        install_command(spec(tmp_path), "format")


def test_a_phase_runs_in_a_home_of_its_own_that_is_gone_afterwards(tmp_path: Path) -> None:
    homes: list[Path] = []

    def phase(command: object) -> tuple[int, str]:
        env = command.env  # type: ignore[attr-defined]
        homes.extend([Path(env["HOME"]), Path(env["TMPDIR"])])
        assert all(home.is_dir() for home in homes)
        assert env["PATH"].startswith(f"{tmp_path / 'shim'}:")
        return 0, "### Formatting hard drive with disko ###\nnoise\n"

    said: list[str] = []
    runner = FakeRunner(script=[(("nixos-anywhere",), phase)])
    run_phase(runner, spec(tmp_path), "disko", search_path="/bin", log_file=tmp_path / "l", lock_fd=0, say=said.append)
    assert said == ["Formatting hard drive with disko"]
    assert not any(home.exists() for home in homes)
    assert runner.ran[0].timeout_s == 600.0


def test_a_failed_phase_shows_its_last_words_and_how_to_go_on(tmp_path: Path) -> None:
    runner = FakeRunner(script=[(("nixos-anywhere",), (42, "disk is busy"))])
    with pytest.raises(CommandError, match="disk is busy") as caught:
        run_phase(runner, spec(tmp_path), "disko", search_path="", log_file=tmp_path / "l", lock_fd=0)
    assert caught.value.exit_code == 42
    assert "run again" in str(caught.value)


def test_a_wrong_host_key_ends_the_endless_loop_of_the_real_program(tmp_path: Path) -> None:
    runner = FakeRunner(script=[(("nixos-anywhere",), (0, "Host key verification failed.\n" * 3))])
    with pytest.raises(HostKeyError):
        run_phase(runner, spec(tmp_path), "kexec", search_path="", log_file=tmp_path / "l", lock_fd=0)
