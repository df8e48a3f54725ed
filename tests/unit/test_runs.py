"""Runs: the journal's folder, what is read back of it, and a page in which nothing that a host says can act."""

from __future__ import annotations

import io
import json
import os
import re
import stat
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from clawdlets_ops.errors import SettingsError
from clawdlets_ops.journal import AT_WORK_S, EVENTS, LOG_LIMIT_BYTES, Journal, journals, new_run_id, prune, read_journal
from clawdlets_ops.process import Command
from clawdlets_ops.rollout.pool import HostEnd, State
from clawdlets_ops.rollout.progress import Progress
from clawdlets_ops.runs import page, record
from clawdlets_ops.runs.notes import NotingRunner
from clawdlets_ops.sensitive import Redactor, Secret
from clawdlets_ops.testing import FakeRunner, FrozenClock, canary

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></details><style>*{display:none}</style>",
    "</title></svg><svg onload=alert(1)>",
    "{{ 7*7 }}{% for x in () %}",
    "&lt;script&gt;",
    "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202egnp.exe\u2066",
)


def told(folder: Path, clock: FrozenClock, *, redactor: Redactor | None = None) -> Journal:
    return Journal(folder / new_run_id(clock.at), now=clock.now, redactor=redactor or Redactor())


def bad_day(folder: Path) -> record.Run:
    """alpha ends well, bravo fails with all that is hostile, charlie is cut off, delta has nothing to do."""
    clock = FrozenClock()
    journal = told(folder, clock)
    with journal.stage("alpha", "payload") as say:
        clock.sleep(2)
        say("built")
    with journal.stage("alpha", "provision"):
        clock.sleep(60)
    with suppress(OSError), journal.stage("bravo", "install") as say:
        for text in HOSTILE:
            say(text)
        clock.sleep(30)
        raise OSError("\n".join(HOSTILE))
    journal.say("charlie", "install", "started")
    journal.say("delta", "payload", "unchanged", "nothing to do")
    clock.sleep(5)
    journal.say("charlie", "install", "step", "phase kexec")
    return record.find_run(folder, None)


class Elements(HTMLParser):
    """Every element and attribute of a page, and all of its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


class TestPage:
    def test_what_a_host_says_is_text_and_nothing_else(self, tmp_path: Path) -> None:
        harmless = told(tmp_path / "harmless", FrozenClock())
        with suppress(OSError), harmless.stage("bravo", "install") as say:
            say("plain")
            raise OSError("boom")
        plain = Elements(page.render(record.find_run(tmp_path / "harmless", None)))
        hostile = Elements(page.render(bad_day(tmp_path / "hostile")))
        assert hostile.tags == plain.tags
        assert hostile.attributes == plain.attributes
        for text in HOSTILE[:-1]:
            assert text in hostile.text  # it is shown as it was said

    def test_a_host_or_stage_by_a_hostile_name_is_text_too(self, tmp_path: Path) -> None:
        event = {"ts": "2026-01-01T00:00:00+00:00", "host": HOSTILE[1], "stage": HOSTILE[3], "event": "started"}
        run = record.read_run(
            "r", tmp_path, [{**event, "text": ""}, {**event, "event": HOSTILE[0], "text": HOSTILE[0]}]
        )
        assert run is not None
        assert not {"img", "script"} & Elements(page.render(run)).tags

    def test_nothing_is_loaded_and_no_script_is_there(self, tmp_path: Path) -> None:
        text = page.render(bad_day(tmp_path))
        assert "default-src 'none'" in text
        assert not {"script", "link", "img", "iframe", "object", "base", "form"} & Elements(text).tags
        assert re.findall(r"(?:https?:)?//|url\(|@import", text) == []

    def test_terminal_commands_and_turned_text_do_not_get_through(self, tmp_path: Path) -> None:
        run = bad_day(tmp_path)
        written = page.render(run) + (run.path / EVENTS).read_text() + (run.path / "bravo.log").read_text()
        assert re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", written) is None

    def test_it_says_who_was_where_when_and_how_it_ended(self, tmp_path: Path) -> None:
        text = re.sub(r"\s+", " ", Elements(page.render(bad_day(tmp_path))).text)
        assert "1 done, 1 nothing to do, 1 failed, 1 unfinished" in text
        assert "alpha: provision, done, 1 min 0 s" in text
        assert "bravo: install, failed, 30 s" in text
        assert "charlie: install, unfinished, no end" in text

    def test_the_bars_lie_in_the_drawing(self, tmp_path: Path) -> None:
        run = bad_day(tmp_path)
        for bar in page.bars(run, (run.last - run.started).total_seconds()):
            assert bar.x >= 0
            assert bar.width > 0
            assert bar.x + bar.width <= page.WIDTH + 1

    def test_it_is_private_and_written_anew_only_after_something_happened(self, tmp_path: Path) -> None:
        run = bad_day(tmp_path)
        page.refresh(run.path)
        written = run.path / page.PAGE
        assert stat.S_IMODE(written.stat().st_mode) == 0o600
        written.write_text("as it was")
        later = (run.path / EVENTS).stat().st_mtime_ns + 10
        os.utime(written, ns=(later, later))
        page.refresh(run.path)
        assert written.read_text() == "as it was"
        os.utime(run.path / EVENTS, ns=(later + 10, later + 10))
        page.refresh(run.path)
        assert "bravo" in written.read_text()

    def test_a_run_without_a_host_has_no_page(self, tmp_path: Path) -> None:
        journal = told(tmp_path, FrozenClock())
        page.refresh(journal.folder)
        journal.say("", "run", "started", "bootstrap")
        page.refresh(journal.folder)
        assert [path.name for path in journal.folder.iterdir()] == [EVENTS]
        assert record.list_runs(tmp_path) == []

    @pytest.mark.parametrize(
        ("value", "text"), [(None, "no end"), (0.04, "0.0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3720, "1 h 2 min")]
    )
    def test_seconds_for_people(self, value: float | None, text: str) -> None:
        assert page.seconds(value) == text

    @pytest.mark.parametrize("total_s", [1, 7, 61, 900, 86_400])
    def test_the_axis_has_few_round_ticks(self, total_s: int) -> None:
        assert 1 <= len(page.ticks(total_s)) <= 9


class TestJournal:
    def test_files_are_private_and_lines_whole(self, tmp_path: Path) -> None:
        run = bad_day(tmp_path)
        assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
        for path in run.path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert sorted(path.name for path in run.path.glob("*.log")) == [
            "alpha.log", "bravo.log", "charlie.log", "delta.log",
        ]  # fmt: skip

    def test_what_is_known_to_be_secret_is_scrubbed(self, tmp_path: Path) -> None:
        secret = canary("journal")
        journal = told(tmp_path, FrozenClock(), redactor=Redactor([secret]))
        journal.say("alpha", "install", "step", f"the target said {secret.reveal()}")
        journal.note("alpha", f"and {secret.reveal()}")
        written = [path.read_text() for path in journal.folder.iterdir()]
        assert all("[secret]" in text for text in written)
        assert not any(secret.reveal() in text for text in written)

    def test_a_name_that_is_no_hosts_makes_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be a host"):
            told(tmp_path, FrozenClock()).note("../../escape", "text")
        assert list(tmp_path.rglob("*escape*")) == []

    def test_a_log_that_is_full_takes_no_more(self, tmp_path: Path) -> None:
        journal = told(tmp_path, FrozenClock())
        journal.note("alpha", "first")
        log = journal.folder / "alpha.log"
        os.truncate(log, LOG_LIMIT_BYTES + 1)
        journal.note("alpha", "second")
        assert log.stat().st_size == LOG_LIMIT_BYTES + 1

    def test_a_line_cut_by_a_kill_and_what_is_no_event_are_left_out(self, tmp_path: Path) -> None:
        run = bad_day(tmp_path)
        whole = len(read_journal(run.path / EVENTS))
        with (run.path / EVENTS).open("a") as handle:
            handle.write('[1]\n"text"\n{"ts": "never", "host": "x", "stage": "y", "event": "z"}\n{"ts": "2026-01-01T')
        assert len(read_journal(run.path / EVENTS)) == whole + 1
        assert record.find_run(tmp_path, run.id).spans == run.spans

    def test_the_newest_runs_are_kept_and_those_at_work(self, tmp_path: Path) -> None:
        clock = FrozenClock()
        for number in range(6):
            clock.sleep(1)
            told(tmp_path, clock).say("alpha", "payload", "started", str(number))
        (tmp_path / "notes.txt").write_text("not a run")
        files = journals(tmp_path)
        old = files[2].stat().st_mtime + AT_WORK_S + 1
        prune(tmp_path, keep=4, now_s=lambda: files[1].stat().st_mtime)  # all may be at work
        assert len(journals(tmp_path)) == 6
        prune(tmp_path, keep=4, now_s=lambda: old)
        assert journals(tmp_path) == files[2:]
        assert (tmp_path / "notes.txt").exists()

    def test_a_new_run_prunes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("clawdlets_ops.journal.AT_WORK_S", -1.0)
        clock = FrozenClock()
        for _ in range(53):
            clock.sleep(1)
            told(tmp_path, clock).say("alpha", "payload", "started")
        assert len(journals(tmp_path)) == 50 + 1  # the one that prunes has no events yet


class TestRecord:
    def test_a_run_of_the_first_version_is_read_too(self, tmp_path: Path) -> None:
        event = {"ts": "2026-01-01T00:00:00+00:00", "host": "alpha", "stage": "payload", "text": ""}
        lines = [json.dumps({**event, "event": kind}) for kind in ("started", "done")]
        (tmp_path / "20260101T000000-12345.jsonl").write_text("\n".join(lines))
        run = record.find_run(tmp_path, None)
        assert (run.id, run.state) == ("20260101T000000-12345", "done")
        assert page.write_page(run) == ""

    def test_runs_are_found_by_the_beginning_of_their_id(self, tmp_path: Path) -> None:
        clock = FrozenClock()
        for _ in range(2):
            told(tmp_path, clock).say("alpha", "payload", "started")
            clock.sleep(86_400)
        first, second = [path.parent.name for path in journals(tmp_path)]
        assert record.find_run(tmp_path, first[:8]).id == first
        assert record.find_run(tmp_path, None).id == second
        assert [run.id for run in record.list_runs(tmp_path)] == [second, first]
        for ident, says in ((first[:6], "more than one"), ("x", "no such run")):
            with pytest.raises(SettingsError, match=says):
                record.find_run(tmp_path, ident)
        with pytest.raises(SettingsError, match="no such run"):
            record.find_run(tmp_path / "nowhere", None)

    def test_a_stage_done_twice_is_two_spans(self, tmp_path: Path) -> None:
        journal = told(tmp_path, FrozenClock())
        for _ in range(2):
            with journal.stage("alpha", "payload"):
                pass
        assert [span.state for span in record.find_run(tmp_path, None).spans] == ["done", "done"]

    def test_the_worst_counts(self) -> None:
        assert record.worst(["done", "unchanged"]) == "done"
        assert record.worst(["unchanged"]) == "unchanged"
        assert record.worst(["failed", "unfinished"]) == "failed"
        assert record.worst([]) == "unfinished"

    def test_as_json(self, tmp_path: Path) -> None:
        document = json.loads(json.dumps(bad_day(tmp_path).as_json()))
        assert document["state"] == "failed"
        assert document["hosts"]["bravo"]["stages"][0]["state"] == "failed"
        assert document["hosts"]["charlie"]["stages"][0]["endedAt"] is None


class TestNotes:
    def test_command_lines_are_noted_and_output_only_where_it_goes_to_a_file(self, tmp_path: Path) -> None:
        journal = told(tmp_path, FrozenClock())
        secret = Secret("canary-of-the-notes", "canary")
        inner = FakeRunner([(("sops",), (0, "canary-decrypted-value")), (("tofu",), (0, f"applied {secret.reveal()}"))])
        runner = NotingRunner(inner, journal, "alpha")
        heard: list[str] = []
        runner.run(Command(["sops", "decrypt", "f"], "read"), on_line=heard.append)
        applied = Command(["tofu", "apply"], "apply", log_file=tmp_path / "apply.log", env={"TOKEN": secret})
        runner.run(applied, on_line=heard.append)
        log = (journal.folder / "alpha.log").read_text()
        assert "$ sops decrypt f" in log
        assert "canary-decrypted-value" not in log
        assert "  applied [secret]" in log
        assert secret.reveal() not in log
        assert heard == ["canary-decrypted-value", "applied [secret]"]

    def test_endless_output_is_noted_up_to_a_limit_and_heard_to_its_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("clawdlets_ops.runs.notes.LINES_NOTED", 20)
        journal = told(tmp_path, FrozenClock())
        inner = FakeRunner([(("yes",), (0, "y\n" * 120))])
        heard: list[str] = []
        command = Command(["yes"], "say yes", log_file=tmp_path / "log")
        NotingRunner(inner, journal, "alpha").run(command, on_line=heard.append)
        assert len(heard) == 120
        assert (journal.folder / "alpha.log").read_text().count("  y\n") == 20


class TestProgress:
    def make(self, *, terminal: bool, hosts: int = 3, height: int = 20) -> tuple[Progress, io.StringIO]:
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=100, height=height, color_system=None)
        clock = FrozenClock()
        progress = Progress(
            [f"h{number}" for number in range(hosts)], console, lambda: (clock.at - FrozenClock().at).total_seconds()
        )
        return progress, out

    def test_without_a_terminal_every_event_is_a_plain_line(self) -> None:
        progress, out = self.make(terminal=False)
        with progress.shown:
            progress.listen("h0", "install", "step: [red]phase\x1b[2J kexec")
            progress.end(HostEnd("h0", State.FAILED, "install", "boom", 3.0))
        lines = out.getvalue().splitlines()
        assert lines[0].endswith("h0: install: [red]phase\N{REPLACEMENT CHARACTER}[2J kexec")
        assert lines[1].endswith("h0: failed (3.0 s)")
        assert "\x1b" not in out.getvalue()

    def test_on_a_terminal_a_row_a_host_those_at_work_first(self) -> None:
        progress, out = self.make(terminal=True)
        progress.end(HostEnd("h0", State.CHANGED, "verify", "23 passed", 60.0))
        progress.listen("h2", "install", "step: phase [bold]kexec[/bold]")
        progress.console.print(progress.table())
        rows = [line.split() for line in out.getvalue().splitlines()]
        assert [row[0] for row in rows[1:4]] == ["h2", "h0", "h1"]
        assert rows[1][1:] == ["at", "work", "install", "phase", "[bold]kexec[/bold]"]
        assert "1 of 3 hosts are through" in out.getvalue()

    def test_a_fleet_larger_than_the_screen_says_how_many_are_not_shown(self) -> None:
        progress, out = self.make(terminal=True, hosts=200, height=24)
        for number in range(50):
            progress.listen(f"h{number + 100}", "install", "started")
        progress.console.print(progress.table())
        assert len(out.getvalue().splitlines()) <= 24
        assert "180 not shown" in out.getvalue()


def test_run_ids_sort_by_time() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    ids = [new_run_id(at + timedelta(seconds=seconds)) for seconds in (0, 1, 60, 86_400)]
    assert ids == sorted(ids)
