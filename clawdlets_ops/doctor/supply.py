"""What a project's workflows and lock files fix. Pure: parsed text in, one sentence for each fault out.

Source: security model, "Supply chain (CI)"; docs.github.com on ``uses`` and on dependabot.yml.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_COMMIT = re.compile(r"[^@\s]+/[^@\s]+@[0-9a-f]{40}")
_DIGEST = re.compile(r"docker://[^@\s]+@sha256:[0-9a-f]{64}")
_MERGES = re.compile(
    r"\bgh\s+pr\s+merge\b|\bgh\s+pr\s+review\b.*\s(?:-a|--approve)\b|\bgh\s+api\b.*\bpulls/\S+/merge\b|\bpulls\.merge\b"
    r"|auto[-_]?merge|auto[-_]?approve|\bmerge-me-action\b|\bmergify\b|\bkodiak\b|\bbulldozer\b",
    re.IGNORECASE,
)
_WITH_REVISION = frozenset({"git", "github", "gitlab", "sourcehut", "mercurial"})


def is_workflow(path: str) -> bool:
    """Whether a tracked file is a workflow or a composite action of GitHub's."""
    folder, _, name = path.rpartition("/")
    if not name.endswith((".yml", ".yaml")):
        return False
    return f"/{folder}".endswith("/.github/workflows") or name in ("action.yml", "action.yaml")


def unpinned(workflow: Any) -> list[str]:
    """Every ``uses:`` that is not fixed to a full commit, or for ``docker://`` to a digest; ``./`` is this very commit."""
    return [
        f"uses {text}, which is not pinned to a commit"
        for key, text in _strings(workflow)
        if key == "uses" and not (text.startswith("./") or _COMMIT.fullmatch(text) or _DIGEST.fullmatch(text))
    ]


def merging(workflow: Any) -> list[str]:
    """Every string that merges or approves a pull request by itself; a command may go on over several lines."""
    lines = [re.sub(r"\s+", " ", text.replace("\\\n", " ")) for _, text in _strings(workflow)]
    return [f"merges or approves by itself: {found.group()}" for line in lines if (found := _MERGES.search(line))]


def dependabot_gaps(config: Any, *, workflows: bool) -> list[str]:
    """Why dependabot.yml does not look after the project every week."""
    updates = config.get("updates") if isinstance(config, dict) else None
    if not isinstance(updates, list) or config.get("version") != 2:
        return ["is not a dependabot.yml of version 2"]
    entries = [entry for entry in updates if isinstance(entry, dict)]
    gaps = []
    if workflows and "github-actions" not in [entry.get("package-ecosystem") for entry in entries]:
        gaps.append("does not look after github-actions")
    for entry in entries:
        name, schedule = entry.get("package-ecosystem"), entry.get("schedule")
        interval = schedule.get("interval") if isinstance(schedule, dict) else None
        if interval != "weekly":
            gaps.append(f"looks after {name} {interval or 'never'}, not weekly")
        if entry.get("open-pull-requests-limit") == 0:
            gaps.append(f"may open no pull request for {name}")
    return gaps


def lock_faults(text: str) -> list[str]:
    """What is not fixed in a flake.lock, input by input."""
    try:
        document: Any = json.loads(text)
        nodes, root = document["nodes"], document["root"]
        found = [_node_fault(name, node) for name, node in nodes.items() if name != root]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ["flake.lock is not as nix writes it"]
    return [fault for fault in found if fault]


def _node_fault(name: str, node: dict[str, Any]) -> str:
    locked = node.get("locked") or {}
    if locked.get("type") == "path":
        return f"{name} is locked to a path of one machine"
    if not locked.get("narHash"):
        return f"{name} has no narHash"
    if locked.get("type") in _WITH_REVISION and not locked.get("rev"):
        return f"{name} has no revision"
    return ""


def _strings(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _strings(value, str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value, key)
    elif isinstance(node, str):
        yield key, node
