"""The supply chain rules of the security model: actions pinned to commits, Dependabot every week, no merge by itself.

Each rule is a function from parsed YAML to a list of problems. Each is first shown to catch a bad sample and to let a good
one pass; then this repository's own files are held to all three.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ECOSYSTEMS = frozenset({"pip", "gomod", "github-actions"})

_COMMIT = re.compile(r"[^@\s]+/[^@\s]+@[0-9a-f]{40}")
_DIGEST = re.compile(r"docker://[^@\s]+@sha256:[0-9a-f]{64}")
_MERGES = (
    re.compile(r"\bgh\s+pr\s+merge\b", re.IGNORECASE),
    re.compile(r"\bgh\s+pr\s+review\b.*\s(-a|--approve)\b", re.IGNORECASE),
    re.compile(r"\bgh\s+api\b.*\bpulls/\S+/merge\b", re.IGNORECASE),
    re.compile(r"\bpulls\.merge\b"),
    re.compile(
        r"auto[-_]?merge", re.IGNORECASE
    ),  # also enable-pull-request-automerge and GraphQL's enablePullRequestAutoMerge
    re.compile(r"auto[-_]?approve", re.IGNORECASE),
    re.compile(r"\bmerge-me-action\b|\bmergify\b|\bkodiak\b|\bbulldozer\b", re.IGNORECASE),
)


def unpinned_uses(workflow: Any) -> list[str]:
    """Every ``uses:`` that is not fixed to a full commit SHA, or for ``docker://`` to a digest.

    A tag can be moved by whoever holds the action's repository. ``./`` is this repository's own commit, so it is exempt.
    """
    return [
        f"{where}: {uses!r} is not pinned"
        for where, key, uses in _scalars(workflow)
        if key == "uses" and not (uses.startswith("./") or _COMMIT.fullmatch(uses) or _DIGEST.fullmatch(uses))
    ]


def dependabot_gaps(config: Any, required: frozenset[str]) -> list[str]:
    """Ecosystems that Dependabot does not look after, or not weekly."""
    if not isinstance(config, dict) or config.get("version") != 2:
        return ["version: must be 2"]
    updates = config.get("updates") or []
    gaps = [f"updates: {name} is missing" for name in sorted(required - {u.get("package-ecosystem") for u in updates})]
    for index, update in enumerate(updates):
        interval = (update.get("schedule") or {}).get("interval")
        if interval != "weekly":
            gaps.append(
                f"updates/{index}: {update.get('package-ecosystem')} is {interval or 'unscheduled'}, not weekly"
            )
        if update.get("open-pull-requests-limit") == 0:
            gaps.append(f"updates/{index}: {update.get('package-ecosystem')} may open no pull request")
    return gaps


def merges_by_itself(workflow: Any) -> list[str]:
    """Every step that merges or approves a pull request, by an action, the gh command or the API."""
    found = []
    for where, _, text in _scalars(workflow):
        # A command may be continued over lines, and its flags stand anywhere.
        line = re.sub(r"\s+", " ", text.replace("\\\n", " "))
        if any(pattern.search(line) for pattern in _MERGES):
            found.append(f"{where}: {line!r} merges or approves by itself")
    return found


def _scalars(node: Any, where: str = "", key: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, last key, text) of every string below, comments left out."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _scalars(value, f"{where}/{name}" if where else str(name), str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _scalars(value, f"{where}/{index}", key)
    elif isinstance(node, str):
        yield where, key, node


def _step(text: str) -> Any:
    """A workflow with one step, which is the given YAML."""
    return {"jobs": {"a": {"steps": [yaml.safe_load(text)]}}}


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "uses",
    [
        "actions/checkout@v4",
        "actions/checkout@main",
        "actions/checkout",
        "actions/checkout@" + SHA[:12],
        "actions/checkout@v4 # " + SHA,
        "owner/repo/.github/workflows/shared.yml@v1",
        "docker://alpine:3.20",
        "docker://alpine@sha256:" + SHA,
    ],
)
def test_an_action_that_is_not_pinned_is_caught(uses: str) -> None:
    assert unpinned_uses(_step(f'uses: "{uses}"')) == [f"jobs/a/steps/0/uses: {uses!r} is not pinned"]


def test_a_reusable_workflow_that_is_not_pinned_is_caught() -> None:
    assert unpinned_uses({"jobs": {"a": {"uses": "owner/repo/.github/workflows/shared.yml@v1"}}})


@pytest.mark.parametrize(
    "uses",
    [
        "actions/checkout@" + SHA,
        "owner/repo/sub/folder@" + SHA,
        "./.github/actions/own",
        "docker://alpine@sha256:" + "ab" * 32,
    ],
)
def test_a_pinned_or_local_action_passes(uses: str) -> None:
    assert unpinned_uses(_step(f"uses: {uses} # v1.2.3")) == []


def _dependabot(**intervals: str) -> Any:
    return {
        "version": 2,
        "updates": [
            {"package-ecosystem": name.replace("_", "-"), "directory": "/", "schedule": {"interval": interval}}
            for name, interval in intervals.items()
        ],
    }


def test_gaps_of_dependabot_are_caught() -> None:
    assert dependabot_gaps(_dependabot(pip="weekly", gomod="weekly"), ECOSYSTEMS) == [
        "updates: github-actions is missing"
    ]
    assert dependabot_gaps(_dependabot(pip="weekly", gomod="monthly", github_actions="weekly"), ECOSYSTEMS) == [
        "updates/1: gomod is monthly, not weekly"
    ]
    silenced = _dependabot(pip="weekly")
    silenced["updates"][0]["open-pull-requests-limit"] = 0
    assert dependabot_gaps(silenced, frozenset({"pip"})) == ["updates/0: pip may open no pull request"]
    assert dependabot_gaps({"version": 1}, ECOSYSTEMS) == ["version: must be 2"]
    assert dependabot_gaps({"version": 2, "updates": [{"package-ecosystem": "pip"}]}, frozenset({"pip"})) == [
        "updates/0: pip is unscheduled, not weekly"
    ]


def test_a_weekly_dependabot_passes() -> None:
    assert dependabot_gaps(_dependabot(pip="weekly", gomod="weekly", github_actions="weekly"), ECOSYSTEMS) == []


@pytest.mark.parametrize(
    "step",
    [
        'run: gh pr merge --auto --squash "$PR"',
        "run: |\n  gh pr merge \\\n    --auto 12",
        "run: gh  pr  merge 12 --rebase",
        "run: gh pr review --approve 12",
        "run: gh api -X PUT repos/o/r/pulls/12/merge",
        "run: gh api graphql -f query=@enablePullRequestAutoMerge.graphql",
        f"uses: peter-evans/enable-pull-request-automerge@{SHA}",
        f"uses: pascalgn/automerge-action@{SHA}",
        f"uses: hmarr/auto-approve-action@{SHA}",
        f"uses: ridedott/merge-me-action@{SHA}",
        f"{{uses: actions/github-script@{SHA}, with: {{script: 'await github.rest.pulls.merge(pr)'}}}}",
    ],
)
def test_a_merge_without_a_person_is_caught(step: str) -> None:
    assert len(merges_by_itself(_step(step))) == 1


@pytest.mark.parametrize(
    "step",
    [
        "run: make test  # never gh pr merge --auto",
        "run: gh pr view 12 --json mergeable",
        "run: git merge-base --is-ancestor origin/main HEAD",
        "run: gh pr review --comment -b 'please look'",
        f"uses: actions/checkout@{SHA}",
    ],
)
def test_a_step_that_merges_nothing_passes(step: str) -> None:
    assert merges_by_itself(_step(step)) == []


def _own_workflows() -> list[Path]:
    github = ROOT / ".github"
    return sorted([*github.glob("workflows/*.y*ml"), *github.glob("actions/**/action.y*ml")])


def test_there_is_a_workflow_to_hold_to_the_rules() -> None:
    assert [path.name for path in _own_workflows()] == ["ci.yml", "nix.yml"]
    assert any(key == "uses" for _, key, _ in _scalars(yaml.safe_load(_own_workflows()[0].read_text())))


@pytest.mark.parametrize("path", _own_workflows(), ids=lambda path: path.name)
def test_our_workflows_keep_the_rules(path: Path) -> None:
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert unpinned_uses(workflow) == []
    assert merges_by_itself(workflow) == []
    assert workflow["permissions"] == {"contents": "read"}
    # A SHA says nothing to the person who reviews it: its version stands beside it.
    assert [line for line in text.splitlines() if "uses:" in line and not re.search(r"# v\d+(\.\d+)*$", line)] == []


def test_our_dependabot_keeps_the_rules() -> None:
    config = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())
    assert dependabot_gaps(config, ECOSYSTEMS) == []
    assert merges_by_itself(config) == []
    manifests = {"pip": "requirements/test.in", "gomod": "tools/go.mod", "github-actions": ".github/workflows/ci.yml"}
    for update in config["updates"]:
        # Where it looks, there is something: an entry with a wrong directory is silent for ever.
        inside = ROOT / update["directory"].lstrip("/")
        assert (ROOT / manifests[update["package-ecosystem"]]).is_relative_to(inside)
    assert (
        not list(ROOT.glob(".mergify.y*ml"))
        + list(ROOT.glob(".github/mergify.y*ml"))
        + list(ROOT.glob("*renovate.json*"))
    )
