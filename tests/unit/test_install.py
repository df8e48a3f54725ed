import json
from datetime import datetime
from pathlib import Path

import pytest

from clawdlets_ops import ssh
from clawdlets_ops.errors import CommandError, CommandTimeout, HostKeyError, SettingsError, UnreachableError
from clawdlets_ops.hetzner import Server
from clawdlets_ops.install import Known, Seen, TargetState, classify, flake_reference, plan, read_known, resume_phases
from clawdlets_ops.install.receipt import Progress, compose
from clawdlets_ops.layout import Layout
from clawdlets_ops.nixos_anywhere import (
    PHASES,
    PREFLIGHT,
    UPLOADING,
    InstallSpec,
    Watch,
    install_command,
    printable,
    run_phase,
)
from clawdlets_ops.testing import FakeRunner

PIN = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPV7Xv1d2Vf1g3mOZx0KxV0uQb9i3kJt5m6o7p8q9r0s"
FRESH = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
OTHER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB"
DEBIAN = 'ID=debian\nVERSION_ID="12"\n'
INSTALLER = 'ID=nixos\nVARIANT_ID="installer"\n'
BOTH = frozenset({"disko", "install"})


@pytest.mark.parametrize(
    ("key", "pin", "known", "state"),
    [
        (PIN, PIN, Known(), TargetState.INSTALLED),
        (PIN, PIN, Known(FRESH), TargetState.INSTALLED),
        (FRESH, PIN, Known(FRESH), TargetState.FRESH),
        (FRESH, PIN, Known(), TargetState.FRESH),
        (FRESH, None, Known(), TargetState.FRESH),
        (OTHER, PIN, Known(FRESH), TargetState.STRANGER),
        # it was installed, and now shows a key that nobody knows: its rescue system, or somebody else
        (OTHER, PIN, Known(installed=True), TargetState.STRANGER),
        (FRESH, PIN, Known(FRESH, installed=True), TargetState.FRESH),
        (None, PIN, Known(FRESH), TargetState.UNKNOWN),
    ],
)
def test_a_target_is_what_its_key_says(key: str | None, pin: str | None, known: Known, state: TargetState) -> None:
    assert classify(key, pin=pin, known=known) is state


def test_an_installed_host_has_nothing_to_install_and_an_absent_one_everything() -> None:
    assert plan("alpha", Seen(TargetState.INSTALLED)).empty
    assert plan("alpha", Seen(TargetState.ABSENT)).phases == PHASES
    assert plan("alpha", Seen(TargetState.FRESH)).phases == PHASES


def test_what_was_begun_and_not_proven_is_finished_without_a_phase() -> None:
    planned = plan("alpha", Seen(TargetState.INSTALLED), unfinished=True)
    assert (planned.empty, planned.phases, planned.finish) == (False, (), True)
    assert "receipt" in str(planned)


def test_a_stranger_and_a_silent_locked_host_are_refused() -> None:
    with pytest.raises(HostKeyError, match=ssh.fingerprint(OTHER)[:20].replace("+", r"\+")) as caught:
        plan("alpha", Seen(TargetState.STRANGER, "198.51.100.7", OTHER))
    assert "--data reinstall=alpha" in caught.value.fix
    with pytest.raises(UnreachableError, match="does not answer over the tailnet"):
        plan("alpha", Seen(TargetState.UNKNOWN), edge_open=False)


def test_a_silent_server_with_an_open_edge_is_waited_for() -> None:
    assert not plan("alpha", Seen(TargetState.UNKNOWN), edge_open=True).empty


def test_what_is_known_is_known_of_this_server_only(tmp_path: Path) -> None:
    layout = Layout(tmp_path)

    def server(ident: int) -> Server:
        return Server(ident, "alpha", "running", {}, "cx23", "nbg1", "198.51.100.7", None, {})

    assert read_known(layout, "alpha", server(7)) == Known()
    for path in (layout.installer_pin("alpha"), layout.install_receipt("alpha")):
        path.parent.mkdir(parents=True)
    layout.installer_pin("alpha").write_text(f"7 {FRESH}\n")
    assert read_known(layout, "alpha", server(7)) == Known(FRESH, unfinished=True)
    assert read_known(layout, "alpha", server(8)) == Known()
    layout.installer_pin("alpha").unlink()
    layout.install_receipt("alpha").write_text('{"serverId": 7}')
    assert read_known(layout, "alpha", server(7)) == Known(installed=True)
    assert read_known(layout, "alpha", server(8)) == Known()
    layout.install_receipt("alpha").write_bytes(b"\x00\xff no json")
    assert read_known(layout, "alpha", server(7)) == Known()
    layout.install_dir("alpha").mkdir(parents=True)
    assert read_known(layout, "alpha", server(7)).unfinished


@pytest.mark.parametrize(
    ("os_release", "mounted", "laid", "done", "phases"),
    [
        (DEBIAN, False, False, frozenset(), ("kexec", "disko", "install", "reboot")),
        (DEBIAN, True, True, BOTH, ("kexec", "disko", "install", "reboot")),
        (INSTALLER, False, False, frozenset(), ("disko", "install", "reboot")),
        (INSTALLER, False, False, BOTH, ("disko", "install", "reboot")),
        (INSTALLER, True, False, frozenset({"disko"}), ("install", "reboot")),
        (INSTALLER, True, True, BOTH, ("reboot",)),
        # cut short: half a formatting may have mounted the root only; a profile may be there without a boot loader
        (INSTALLER, True, False, frozenset(), ("disko", "install", "reboot")),
        (INSTALLER, True, True, frozenset({"disko"}), ("install", "reboot")),
    ],
)
def test_an_installation_goes_on_where_the_target_stands(
    os_release: str, done: frozenset[str], phases: tuple[str, ...], *, mounted: bool, laid: bool
) -> None:
    assert resume_phases(os_release, mounted=mounted, system_laid=laid, done=done) == phases


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


def test_the_preflight_builds_nothing_and_evaluates_nothing(tmp_path: Path) -> None:
    words = install_command(spec(tmp_path), PREFLIGHT)
    assert words[-2:] == ["--phases", ""]
    assert words[words.index("--build-on") + 1] == "local"
    assert "--no-use-machine-substituters" in words


def test_the_options_that_do_other_than_they_say_are_never_used(tmp_path: Path) -> None:
    # --chown cuts paths at 35 characters, --force-kexec swallows its neighbour, a pinned key is no --ssh-option
    for phase in (*PHASES, PREFLIGHT):
        words = install_command(spec(tmp_path), phase)
        assert not {"--chown", "--force-kexec", "--ssh-option", "--env-password", "--copy-host-keys"} & set(words)


def run(runner: FakeRunner, tmp_path: Path, phase: str = "disko", said: list[str] | None = None) -> float:
    return run_phase(
        runner,
        spec(tmp_path),
        phase,
        scratch=tmp_path / "scratch",
        search_path="/bin",
        log_file=tmp_path / "l",
        lock_fd=0,
        say=(said if said is not None else []).append,
    )


def test_a_phase_runs_in_a_home_of_its_own_that_is_gone_afterwards(tmp_path: Path) -> None:
    homes: list[Path] = []

    def phase(command: object) -> tuple[int, str]:
        env = command.env  # type: ignore[attr-defined]
        homes.extend([Path(env["HOME"]), Path(env["TMPDIR"])])
        assert all(home.is_dir() and home.stat().st_mode & 0o777 == 0o700 for home in homes)
        assert env["PATH"].startswith(f"{tmp_path / 'shim'}:")
        assert set(env) == {"HOME", "TMPDIR", "PATH"}
        return 0, "### Formatting hard drive with disko ###\nnoise\n"

    said: list[str] = []
    runner = FakeRunner(script=[(("sh",), phase)])
    run(runner, tmp_path, said=said)
    assert said == ["Formatting hard drive with disko"]
    assert homes
    assert not (tmp_path / "scratch").exists()
    assert runner.ran[0].timeout_s == 600.0
    assert runner.ran[0].keep_fds == (0,)
    assert runner.ran[0].stdin is None


def test_the_private_folders_go_when_the_phase_fails_or_is_cut_off(tmp_path: Path) -> None:
    def fail(error: BaseException) -> FakeRunner:
        def phase(command: object) -> tuple[int, str]:
            (tmp_path / "scratch" / "tmp" / "key").write_text("a canary, no key")
            raise error

        return FakeRunner(script=[(("sh",), phase)])

    for error in (KeyboardInterrupt(), CommandTimeout("it did not end within 1 s"), OSError(28, "No space left")):
        with pytest.raises(type(error)):
            run(fail(error), tmp_path)
        assert not (tmp_path / "scratch").exists()


def test_what_an_earlier_phase_left_is_gone_before_the_next_begins(tmp_path: Path) -> None:
    left = tmp_path / "scratch" / "tmp" / "tmp.x" / "nixos-anywhere"
    left.parent.mkdir(parents=True)
    left.write_text("a canary, no key")
    runner = FakeRunner(script=[(("sh",), lambda _: (0, "") if not left.exists() else (1, "still there"))])
    run(runner, tmp_path)


def test_a_failed_phase_shows_its_last_words_and_how_to_go_on(tmp_path: Path) -> None:
    noise = "Warning: Identity file /k not accessible: No such file or directory.\n"
    runner = FakeRunner(script=[(("sh",), (42, f"{noise}disk is \x1b[31mbusy"))])
    with pytest.raises(CommandError, match="disk is \ufffd") as caught:
        run(runner, tmp_path)
    assert caught.value.exit_code == 42
    assert "run again" in str(caught.value)
    assert "not accessible" not in str(caught.value)
    runner = FakeRunner(script=[(("sh",), (255, "Connection to 198.51.100.7 closed by remote host."))])
    with pytest.raises(CommandError, match="the connection to the target broke"):
        run(runner, tmp_path, "install")


def test_output_is_shown_without_what_a_terminal_obeys_and_not_for_ever() -> None:
    assert printable("a\x1b]0;title\x07b\tc") == "a\ufffd]0;title\ufffdb c"
    assert len(printable("x" * 100_000)) < 500


HOPELESS = {
    # what the program prints, again and again: (the error, what it says, how often it takes, only while uploading)
    "Host key verification failed.": (HostKeyError, "another host key", 1, False),
    "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @": (HostKeyError, "another host key", 1, False),
    "root@198.51.100.7: Permission denied (publickey).": (UnreachableError, "refuses our key", 3, False),
    "Received disconnect from 198.51.100.7 port 22:2: Too many authentication failures": (
        UnreachableError,
        "before our key was tried",
        1,
        False,
    ),
    "ssh: connect to host 198.51.100.7 port 22: Connection refused": (UnreachableError, "port 22", 3, True),
    "ssh: connect to host 198.51.100.7 port 22: Connection timed out": (UnreachableError, "port 22", 3, True),
    "sh: 1: cannot create .ssh/authorized_keys: Read-only file system": (UnreachableError, "authorized_keys", 2, True),
    "/usr/bin/ssh-copy-id: ERROR: Too many arguments.  Expecting a target hostname, got:": (
        UnreachableError,
        "ssh-copy-id",
        4,
        True,
    ),
}


@pytest.mark.parametrize("line", HOPELESS)
def test_what_the_program_would_try_for_ever_ends_with_the_reason(line: str) -> None:
    kind, says, times, uploading_only = HOPELESS[line]
    watch = Watch("198.51.100.7", lambda _: None)
    watch(f"### {UPLOADING} ###")
    for _ in range(times - 1):
        watch(line)
    with pytest.raises(kind, match=says) as caught:
        watch(line)
    assert caught.value.where == "198.51.100.7"
    assert caught.value.fix
    elsewhere = Watch("198.51.100.7", lambda _: None)
    elsewhere("### Waiting for the machine to become unreachable due to reboot ###")
    if uploading_only:  # a machine that reboots refuses connections: that is what is waited for
        for _ in range(50):
            elsewhere(line)


def test_progress_is_the_programs_own_marks_and_nothing_else() -> None:
    said: list[str] = []
    watch = Watch("a", said.append)
    for line in ("### Rebooting ###", "## no ##", "x ### y ###", "### a\x07b ###", "noise"):
        watch(line)
    assert said == ["Rebooting", "a\ufffdb"]


def test_a_receipt_says_how_the_fresh_servers_key_was_trusted_and_where_it_was_seen_again(tmp_path: Path) -> None:
    progress = Progress.read(tmp_path / "progress.json")
    progress.contact("SHA256:canary", {4: "198.51.100.7", 6: "2001:db8::1"}, now := datetime(2026, 1, 1))
    for step in ("first look", "kexec", "kexec", "disko"):
        progress.met(step)
    progress.ended("kexec", now, 12.3456)
    again = Progress.read(tmp_path / "progress.json")
    document = compose(
        "alpha", server_id=7, operator="olive", digest="d", tools={}, flake={"revision": None}, progress=again
    )
    assert document["firstContact"]["trust"] == "at first sight"
    assert document["firstContact"]["sameKeySeenAgainIn"] == ["first look", "kexec", "disko"]
    assert document["phases"] == [{"phase": "kexec", "startedAt": "2026-01-01T00:00:00", "durationS": 12.346}]
    (tmp_path / "progress.json").write_text('{"phases": [')
    assert Progress.read(tmp_path / "progress.json").phases == []
    assert json.dumps(document)
