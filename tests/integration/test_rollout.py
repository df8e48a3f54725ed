"""Many hosts at once: none waits for another, none stops another, a signal ends all in order, the budget is kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawdlets_ops import workflow
from clawdlets_ops.errors import CloudError, CommandError
from clawdlets_ops.hetzner import Budget, HetznerCloud
from clawdlets_ops.journal import Journal
from clawdlets_ops.lab.api import Emulator
from clawdlets_ops.lab.backend import LoopbackPool, StubBackend
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab.ratelimit import Budget as Bucket
from clawdlets_ops.process import Command, LocalRunner
from clawdlets_ops.rollout import pool
from clawdlets_ops.rollout.pool import HostEnd, State
from clawdlets_ops.rollout.snapshot import MAX_AGE_S, Snapshot
from clawdlets_ops.sensitive import Secret
from clawdlets_ops.workflow import STAGES, Outcome
from tests.integration import test_bad_input
from tests.integration.test_bad_input import PROGRAMS, TOKEN, Desk

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
desk = test_bad_input.desk

HOSTS = [f"h{number}" for number in range(8)]


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def done(host: str, *, changed: bool = False) -> Iterator[Outcome]:
    for stage in STAGES:
        yield Outcome(stage, host, changed, "text", 0.0)


class TestPool:
    def test_a_host_waits_for_no_other_at_a_stage(self) -> None:
        last_is_through = threading.Event()

        def flow(host: str) -> Iterator[Outcome]:
            for outcome in done(host):
                if host == "h0" and outcome.stage == "provision":
                    assert last_is_through.wait(30)
                yield outcome
            if host == "h7":
                last_is_through.set()

        ends = pool.run(flow, HOSTS, parallel=2, stop=threading.Event())
        assert [end.host for end in ends] == HOSTS
        assert {end.state for end in ends} == {State.UNCHANGED}

    def test_a_failing_host_stops_no_other_whatever_it_fails_with(self) -> None:
        def flow(host: str) -> Iterator[Outcome]:
            stages = done(host, changed=host == "h3")
            yield next(stages)
            if host == "h1":
                raise CommandError("boom", where="tofu")
            if host == "h2":
                raise RuntimeError("a fault of ours")
            yield from stages

        heard: list[HostEnd] = []
        ends = {end.host: end for end in pool.run(flow, HOSTS, parallel=3, stop=threading.Event(), on_end=heard.append)}
        assert (ends["h1"].state, ends["h1"].stage, ends["h1"].text) == (State.FAILED, "provision", "tofu: boom")
        assert (ends["h2"].state, ends["h2"].text) == (State.FAILED, "RuntimeError: a fault of ours")
        assert (ends["h3"].state, ends["h3"].stage) == (State.CHANGED, "verify")
        assert all(ends[host].state is State.UNCHANGED for host in HOSTS if host not in ("h1", "h2", "h3"))
        assert sorted(end.host for end in heard) == HOSTS

    def test_no_more_than_asked_for_are_at_work(self) -> None:
        lock, at_work, most = threading.Lock(), 0, 0
        full = threading.Barrier(3)

        def flow(host: str) -> Iterator[Outcome]:
            nonlocal at_work, most
            with lock:
                at_work += 1
                most = max(most, at_work)
            full.wait(30)  # three at a time, or never
            with lock:
                at_work -= 1
            yield from done(host)

        pool.run(flow, HOSTS[:6], parallel=3, stop=threading.Event())
        assert most == 3

    def test_a_stop_ends_programs_begins_no_host_and_leaves_a_wait_behind(self, tmp_path: Path) -> None:
        stop = threading.Event()
        runner = LocalRunner(os.environ, stop=stop)
        waiting = threading.Event()

        def flow(host: str) -> Iterator[Outcome]:
            yield Outcome("payload", host, False, "", 0.0)
            if host == "h0":
                words = ["sh", "-c", f"echo $$ >{tmp_path}/pid; sleep 60"]
                runner.run(Command(words, "sleep", log_file=tmp_path / "log"))
            if host == "h1":
                runner.run(Command(["sh", "-c", f"echo $$ >{tmp_path}/pid1; sleep 60"], "sleep"))
            waiting.wait(60)  # as one waits for a host that does not answer
            yield from done(host)

        def interrupt() -> None:
            until(lambda: all((tmp_path / name).exists() for name in ("pid", "pid1")))
            stop.set()

        threading.Thread(target=interrupt).start()
        ends = pool.run(flow, HOSTS[:5], parallel=3, stop=stop, grace_s=4.0)
        waiting.set()
        assert [end.state for end in ends] == [State.INTERRUPTED] * 3 + [State.NOT_BEGUN] * 2
        assert ends[0].stage == "provision"
        for name in ("pid", "pid1"):
            until(lambda name=name: not Path("/proc", (tmp_path / name).read_text().strip()).exists())  # type: ignore[misc]
        with pytest.raises(KeyboardInterrupt):
            runner.run(Command(["true"], "anything"))


class TestBudget:
    def test_few_left_ends_a_run_before_a_stage_and_says_when(self) -> None:
        with pytest.raises(CloudError, match="99 of the project's 3600 API requests") as caught:
            pool.check_budget(Budget(3600, 99, 1_767_225_600), where="alpha")
        assert "00:00 UTC" in str(caught.value)
        pool.check_budget(Budget(3600, 100, 0), where="alpha")
        pool.check_budget(None, where="alpha")

    def test_what_others_may_still_ask_is_set_aside(self) -> None:
        for_nine = pool.RESERVE + 9 * pool.STAGE_COST
        pool.check_budget(Budget(3600, for_nine, 0), where="alpha", at_work=9)
        with pytest.raises(CloudError, match=r"are left, on which 9 other hosts draw"):
            pool.check_budget(Budget(3600, for_nine - 1, 0), where="alpha", at_work=9)

    def test_a_run_on_a_budget_that_is_nearly_used_up_begins_few_and_asks_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ten hosts at a time, none of which has been answered anything when they begin; four may change something, and two
        more, which are as declared, are not turned away."""
        spent = Bucket(3600, clock=lambda: 0.0)
        while spent.look().remaining > pool.RESERVE + 3 * pool.STAGE_COST + 1:
            spent.take()
        cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=None)
        journal = tmp_path / "journal.jsonl"
        emulator = Emulator(cloud, token=TOKEN, journal_file=journal, budget=spent)
        emulator.start()
        refused = threading.Semaphore(0)

        def flow(
            _: object, host: str, *__: object, before_change: Callable[[], None], **___: object
        ) -> Iterator[Outcome]:
            yield Outcome("payload", host, False, "", 0.0)
            if host.startswith("as-declared"):
                return
            before_change()
            yield Outcome("provision", host, False, "", 0.0)
            before_change()
            assert refused.acquire(timeout=30)  # at work until the others have been told
            refused.release()

        monkeypatch.setattr(workflow, "bootstrap", flow)
        names = [*(f"h{number}" for number in range(10)), "as-declared-1", "as-declared-2"]
        client = HetznerCloud(Secret(TOKEN), emulator.endpoint, poll_interval_s=0.01)
        tools = workflow.Tools(LocalRunner(os.environ), client, Journal(tmp_path / "run"))
        told: list[HostEnd] = []

        def on_end(end: HostEnd) -> None:
            told.append(end)
            if sum(one.state is State.FAILED for one in told) == 6:
                refused.release()

        try:
            ends = pool.bootstrap(
                None, names, tools=tools, snapshot=Snapshot(client), stop=threading.Event(), parallel=12,  # type: ignore[arg-type]
                on_end=on_end, until="provision",
            )  # fmt: skip
        finally:
            emulator.stop()
            cloud.close()
        assert Counter(end.state for end in ends) == {State.FAILED: 6, State.UNCHANGED: 6}
        assert all("175 of the project's 3600 API requests" in end.text for end in ends if end.state is State.FAILED)
        assert asked(journal) == ["/v1/servers"]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[tuple[Cloud, Emulator, HetznerCloud, Path]]:
    """The emulator with a small budget, no machines, and our client."""
    cloud = Cloud(backend=StubBackend(), addresses=LoopbackPool(), state_file=None)
    journal = tmp_path / "journal.jsonl"
    emulator = Emulator(cloud, token=TOKEN, journal_file=journal, budget=Bucket(1000))
    emulator.start()
    yield cloud, emulator, HetznerCloud(Secret(TOKEN), emulator.endpoint, poll_interval_s=0.01), journal
    emulator.stop()
    cloud.close()


def asked(journal: Path) -> list[str]:
    return [json.loads(line)["path"] for line in journal.read_text().splitlines()]


class TestSnapshot:
    def make(self, client: HetznerCloud, names: list[str], *, label: str = "clawdlets") -> None:
        """Servers as ours are, through the client's own way in."""
        for name in names:
            body = {"name": name, "server_type": "cx23", "image": "debian-12", "labels": {"managed-by": label}}
            client._client.servers._client.request(method="POST", url="/servers", json=body)

    def test_a_fleet_is_read_with_two_requests_and_the_budget_is_known(self, api: Any) -> None:
        _, _, client, journal = api
        names = [f"h{number}" for number in range(40)]
        self.make(client, names)
        before = len(asked(journal))
        snapshot = Snapshot(client)
        threads = [threading.Thread(target=snapshot.server, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert asked(journal)[before:] == ["/v1/servers"]
        assert snapshot.firewall("h0-edge") is None
        assert asked(journal)[before + 1 :] == [
            "/v1/firewalls",
            "/v1/firewalls",
        ]  # the list, and by name: it is not there
        assert client.budget is not None
        assert (client.budget.limit, client.budget.remaining < 1000) == (1000, True)

    def test_what_has_not_our_label_is_found_by_its_name(self, api: Any) -> None:
        _, _, client, _ = api
        self.make(client, ["stranger"], label="somebody")
        found = Snapshot(client).server("stranger")
        assert found is not None
        assert found.labels == {"managed-by": "somebody"}

    def test_what_was_changed_is_read_anew_for_that_host_alone(self, api: Any) -> None:
        _, _, client, journal = api
        self.make(client, ["h0", "h1"])
        now = [0.0]
        snapshot = Snapshot(client, clock=lambda: now[0])
        snapshot.server("h0")
        now[0] = 1.0
        snapshot.forget("h0")
        before = len(asked(journal))
        snapshot.server("h1")
        assert len(asked(journal)) == before
        snapshot.server("h0")
        snapshot.server("h0")
        assert len(asked(journal)) == before + 2
        now[0] = 1.0 + MAX_AGE_S
        snapshot.server("h0")  # a new list: it counts for all
        snapshot.server("h0")
        assert len(asked(journal)) == before + 3

    def test_what_is_the_same_for_every_host_is_asked_once_by_a_new_client_too(self, api: Any) -> None:
        _, _, client, journal = api
        for _ in range(3):
            assert client.may_write()
            assert client.offers()
            assert client.has_image("debian-12", "x86")
        assert sorted(asked(journal)) == ["/v1/images", "/v1/server_types", "/v1/ssh_keys/0"]

    def test_it_changes_nothing(self, api: Any) -> None:
        _, _, client, _ = api
        self.make(client, ["h0"])
        snapshot = Snapshot(client)
        server = snapshot.server("h0")
        assert server is not None
        with pytest.raises(NotImplementedError):
            snapshot.rebuild(server, "debian-12")


class TestCommand:
    def begin(self, desk: Desk, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(PROGRAMS / "clawdlets"), "bootstrap", *words],
            cwd=desk.root, env=desk.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def slow_tofu(self, desk: Desk) -> Path:
        """A stand-in that writes down its process id and then does nothing for long."""
        pids = desk.root / "pids"
        program = Path(desk.env["PATH"].split(":")[0]) / "tofu"
        program.write_text(f"#!/bin/sh\necho $$ >>{pids}\nexec sleep 300\n")
        return pids

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_the_programs_and_says_how_to_go_on(self, desk: Desk, number: signal.Signals) -> None:
        pids = self.slow_tofu(desk)
        process = self.begin(desk)
        until(lambda: pids.exists() and pids.read_text().endswith("\n"))
        process.send_signal(number)
        text, _ = process.communicate(timeout=40)
        assert process.returncode == 130, text
        assert "go on: clawdlets bootstrap alpha" in text
        assert "interrupted" in text
        assert "Traceback" not in text
        for pid in pids.read_text().split():
            with pytest.raises(ProcessLookupError):
                os.kill(int(pid), 0)
        run = json.loads(self.runs(desk, "show", "--json"))
        assert run["hosts"]["alpha"]["stages"][-1]["text"] == "interrupted"
        assert desk.mutations() == []

    def test_a_failing_host_is_in_the_table_the_run_and_the_exit_status(self, desk: Desk) -> None:
        process = self.begin(desk, "alpha", "--parallel", "2")
        text, _ = process.communicate(timeout=90)
        assert process.returncode == 1, text
        assert "reached" in text  # the stand-in tofu's word
        assert re.search(r"^alpha +failed +provision +[0-9.]+ ", text, flags=re.MULTILINE)
        assert "go on: clawdlets bootstrap alpha" in text
        report = Path(re.search(r"^report: (.*)$", text, flags=re.MULTILINE)[1])  # type: ignore[index]
        assert "reached" in report.read_text()
        assert re.search(r"failed +.* alpha", self.runs(desk, "list"))
        assert "payload     done" in self.runs(desk, "show")
        written = "".join(path.read_text() for path in report.parent.iterdir())
        assert "$ tofu" in written
        for value in (*test_bad_input.VALUES.values(), TOKEN):
            assert value not in text + written

    def test_a_disk_of_ours_that_is_full_is_told_and_the_run_goes_on_once_there_is_room(self, desk: Desk) -> None:
        if os.geteuid() != 0:
            pytest.skip("a file system of its own needs root")
        runtime, kept = desk.root / ".clawdlets", desk.root / "kept"
        runtime.rename(kept)
        runtime.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "clawdlets-test", str(runtime)], check=True)
        try:
            shutil.copytree(kept, runtime, dirs_exist_ok=True)
            filler = runtime / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as handle:
                while True:
                    handle.write(b"\0" * 1024)
            text, _ = (process := self.begin(desk)).communicate(timeout=90)
            assert process.returncode == 1, text
            assert "this machine cannot write" in text
            assert "No space left on device" in text
            assert "make room (df), and run again" in text
            assert "Traceback" not in text
            assert desk.mutations() == []
            filler.unlink()
            subprocess.run(["mount", "-o", "remount,size=64m", str(runtime)], check=True)
            text, _ = self.begin(desk).communicate(timeout=90)
            assert re.search(r"^alpha +failed +provision ", text, flags=re.MULTILINE), (
                text
            )  # payload is there; tofu is a stand-in
        finally:
            subprocess.run(["umount", str(runtime)], check=True)

    def test_a_host_that_is_not_declared_is_refused_before_anything(self, desk: Desk) -> None:
        process = self.begin(desk, "nobody")
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "nobody" in text
        assert not (desk.root / ".clawdlets" / "runs").exists()

    def runs(self, desk: Desk, *words: str) -> str:
        argv = [str(PROGRAMS / "clawdlets"), "runs", *words]
        shown = subprocess.run(
            argv, cwd=desk.root, env=desk.env, capture_output=True, text=True, timeout=60, check=True
        )
        return shown.stdout


def test_the_signals_are_as_they_were_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = threading.Event()
    with pool.stopped_by_signals(stop):
        os.kill(os.getpid(), signal.SIGINT)
        until(stop.is_set)
        assert signal.getsignal(signal.SIGINT) == before  # a second one ends at once
    assert signal.getsignal(signal.SIGINT) == before
