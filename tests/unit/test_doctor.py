"""The doctor's pure parts: what counts, what a lock or a reference says, and the search in store paths."""

import json

import pytest

from clawdlets_ops.doctor.catalogue import CATALOGUE
from clawdlets_ops.doctor.judging import Check, some
from clawdlets_ops.doctor.of_clone import references
from clawdlets_ops.doctor.run import Diagnosis, Judged, text
from clawdlets_ops.doctor.snapshot import Scope
from clawdlets_ops.doctor.store import Budget, parse_store, read_listing, search
from clawdlets_ops.doctor.supply import dependabot_gaps, is_workflow, lock_faults, merging, unpinned
from clawdlets_ops.errors import CommandError
from clawdlets_ops.finding import Finding, State
from clawdlets_ops.guard.engine import Engine
from clawdlets_ops.guard.needles import Needle
from clawdlets_ops.sensitive import Secret

KNOWN = Needle("discord_token", Secret("canary-known-0001", "discord_token"))


def judged(state, severity="high"):
    check = Check("X-01", Scope.REPO, severity, "it holds", "looked at", "mend it", lambda snapshot: ())
    return Judged(check, Finding("X-01", state, "it holds", observed="seen", fix="mend it"))


@pytest.mark.parametrize(
    ("found", "plain", "strict"),
    [
        ([judged(State.PASS)], 0, 0),
        ([judged(State.PASS), judged(State.NOT_APPLICABLE)], 0, 0),
        ([judged(State.NOT_APPLICABLE)], 2, 2),
        ([], 2, 2),
        ([judged(State.PASS), judged(State.FAIL, "medium")], 0, 1),
        ([judged(State.PASS), judged(State.FAIL, "low")], 0, 1),
        ([judged(State.PASS), judged(State.FAIL, "high")], 1, 1),
        ([judged(State.PASS), judged(State.FAIL, "critical")], 1, 1),
        ([judged(State.PASS), judged(State.UNKNOWN, "low")], 2, 1),
        ([judged(State.FAIL, "medium"), judged(State.UNKNOWN)], 2, 1),
        ([judged(State.FAIL), judged(State.UNKNOWN)], 1, 1),
    ],
)
def test_what_counts(found, plain, strict):
    diagnosis = Diagnosis(Scope.REPO, tuple(found))
    assert (diagnosis.exit_code(), diagnosis.exit_code(strict=True)) == (plain, strict)


def test_a_failure_is_shown_with_its_claim_and_remedy_and_a_pass_is_one_line():
    shown = text(Diagnosis(Scope.REPO, (judged(State.FAIL), judged(State.FAIL, "low"))))
    assert shown.count("→ mend it") == 2
    assert [line.split()[0] for line in shown.splitlines() if "X-01" in line] == ["FAIL", "warning"]


def test_ids_are_unique_and_every_entry_is_whole():
    assert len({check.id for check in CATALOGUE}) == len(CATALOGUE)
    assert all(check.claim and check.how and check.fix and "|" not in check.how for check in CATALOGUE)


def test_a_long_list_is_cut_and_counted():
    assert some(["a"] * 7) == "a; a; a; a; a; and 2 more"


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ('inputs.x.url = "path:./sub";', True),
        ("nix build path:.#x", True),
        ("nixos-rebuild --flake path:/etc/nixos", True),
        ("nix run path:~/p", True),
        ('url = "git+file:///p";', False),
        ("path: ./relative", False),
        ("# never path:./.", False),
        ("  // never path:./.", False),
        ("my-path:/x", False),
        ("$path:/usr/bin", False),
    ],
)
def test_references_by_path(line, caught):
    assert bool(list(references(line.encode()))) is caught


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "nonsense", '{"nodes": 1, "root": "root"}', '{"nodes": {"a": 1}, "root": "r"}']
)
def test_a_lock_that_is_none_is_a_fault(text):
    assert lock_faults(text) == ["flake.lock is not as nix writes it"]


def test_a_tarball_needs_no_revision_and_a_missing_locked_is_a_fault():
    nodes = {"root": {}, "t": {"locked": {"type": "tarball", "narHash": "sha256-x"}}, "n": {}}
    assert lock_faults(json.dumps({"nodes": nodes, "root": "root"})) == ["n has no narHash"]


SHA = "0a" * 20


@pytest.mark.parametrize(
    ("uses", "faults"),
    [
        (f"actions/checkout@{SHA}", 0),
        (f"docker://alpine@sha256:{'0a' * 32}", 0),
        ("./.github/actions/own", 0),
        ("actions/checkout@v4", 1),
        (f"actions/checkout@{SHA[:12]}", 1),
        ("docker://alpine:3.20", 1),
    ],
)
def test_actions_are_pinned_or_named(uses, faults):
    assert len(unpinned({"jobs": {"a": {"steps": [{"uses": uses}]}}})) == faults


@pytest.mark.parametrize(
    ("run", "faults"),
    [
        ("gh pr merge --auto 7", 1),
        ("gh pr \\\n  merge 7", 1),
        ("gh pr review 7 --approve", 1),
        ("gh api -X PUT repos/o/r/pulls/7/merge", 1),
        ("git merge main", 0),
        ("gh pr review 7 --comment", 0),
    ],
)
def test_what_merges_by_itself(run, faults):
    assert len(merging({"jobs": {"a": {"steps": [{"run": run}]}}})) == faults


def test_dependabot_as_it_should_be_and_not():
    entry = {"package-ecosystem": "github-actions", "schedule": {"interval": "weekly"}}
    assert dependabot_gaps({"version": 2, "updates": [entry]}, workflows=True) == []
    assert len(dependabot_gaps({"version": 2, "updates": []}, workflows=True)) == 1
    assert (
        len(dependabot_gaps({"version": 2, "updates": [{**entry, "open-pull-requests-limit": 0}]}, workflows=True)) == 1
    )
    assert len(dependabot_gaps({"version": 2, "updates": [{**entry, "schedule": None}]}, workflows=True)) == 1
    assert all(
        dependabot_gaps(nonsense, workflows=False) for nonsense in (None, [], "x", {"version": 1}, {"version": 2})
    )


def test_which_files_are_workflows():
    paths = [".github/workflows/ci.yml", "sub/.github/workflows/x.yaml", "tools/own/action.yml"]
    assert all(is_workflow(path) for path in paths)
    assert not any(
        is_workflow(path) for path in (".github/dependabot.yml", "workflows/ci.yml", ".github/workflows/x.md")
    )


def store(tmp_path, content="nothing here\n", count=3):
    for number in range(count):
        folder = tmp_path / f"path-{number}" / "etc"
        folder.mkdir(parents=True)
        (folder / "file.conf").write_text(content if number == 1 else "nothing\n")
    return sorted(tmp_path.glob("path-*"))


@pytest.mark.parametrize("content", ["token=canary-known-0001\n", "Y2FuYXJ5LWtub3duLTAwMDE=\n"])
def test_a_planted_secret_is_found_and_named_but_not_shown(tmp_path, content):
    found = search(store(tmp_path, content), [KNOWN])
    assert [hit.path for hit in found.hits] == [str(tmp_path / "path-1/etc/file.conf")]
    assert "discord_token" in found.hits[0].secret
    assert KNOWN.value.reveal() not in repr(found)
    assert (found.control, found.gaps, found.files) == (True, (), 3)


def test_a_clean_tree_is_clean_only_because_the_canary_was_found(tmp_path):
    clean = search(store(tmp_path), [KNOWN])
    assert (clean.hits, clean.gaps, clean.control) == ((), (), True)
    blind = search(store(tmp_path / "2"), [KNOWN], matcher=lambda needles: Engine([KNOWN], rules=()))
    assert (blind.hits, blind.gaps, blind.control) == ((), (), False)


def test_a_bound_on_bytes_or_time_leaves_a_gap(tmp_path):
    paths = store(tmp_path, "token=canary-known-0001\n")
    few = search(paths, [KNOWN], budget=Budget(size_bytes=4))
    assert few.hits == ()
    assert "bound of 4 bytes" in few.gaps[0]
    ticks = iter(range(0, 1000, 10))
    late = search(paths, [KNOWN], budget=Budget(seconds=25), clock=lambda: next(ticks))
    assert "bound of 25 s" in late.gaps[0]


def test_what_is_not_there_and_what_is_a_link(tmp_path):
    paths = store(tmp_path)
    (paths[0] / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("canary-known-0001\n")
    found = search([*paths, tmp_path / "gone"], [KNOWN])
    assert found.hits == ()
    assert "gone" in found.gaps[0]


@pytest.mark.parametrize("content", ["", "\n", "relative/path\n", b"\xff\xfe"])
def test_a_listing_that_names_nothing_is_refused(tmp_path, content):
    listing = tmp_path / "listing"
    listing.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CommandError):
        read_listing(listing)
    with pytest.raises(CommandError):
        read_listing(tmp_path / "gone")


def test_store_paths_that_the_public_cache_signed_are_left_out():
    entries = {
        "/nix/store/a": {"signatures": ["cache.nixos.org-1:x"]},
        "/nix/store/b": {"signatures": ["own-1:x"]},
        "/nix/store/c": {},
        "/nix/store/d": None,
    }
    listed = [{"path": path, **(entry or {})} for path, entry in entries.items()]
    for document in (entries, listed):
        assert [str(path) for path in parse_store(json.dumps(document))] == [
            "/nix/store/b",
            "/nix/store/c",
            "/nix/store/d",
        ]
    for nonsense in ("1", "nonsense"):
        with pytest.raises(CommandError):
            parse_store(nonsense)
