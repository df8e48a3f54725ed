"""The guard's scan against plain ``re`` and the packaged scanner's own program, in one run: speed and recall.

Speed: MB of ordinary text per second of processor time (of all threads), all rules on, read from files: once as many
files as the goal was measured with, once in the files that the text came in, where opening them is half of the work. The
floors are reading alone, and an automaton of RE2's that looks for one word. Recall: tokens of every kind, each in eight
contexts, made anew from parts; the planted leaks and look-alikes of the tests, one by one with GUARD_TABLE=1. kingfisher
runs offline (no validation, no update check, a network namespace without a way out), once with its own rules and once
with ours added. Seconds are this machine's and mean nothing elsewhere; the ratios do.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from clawdlets_ops.guard import kingfisher, matchers
from clawdlets_ops.guard.engine import PIECE_BYTES, Engine
from clawdlets_ops.guard.needles import Needle
from clawdlets_ops.guard.paths import PATH_RULES
from clawdlets_ops.guard.scan import Ground, Item, file_items, scan
from clawdlets_ops.sensitive import Secret

ROOT = Path(__file__).parents[1]
TEXT_BYTES = 100_000_000
FILES = 2_500
REPEATS = 3
SLOW_BYTES = 10_000_000
GOAL_MB_S = 300.0
KNOWN_SECRETS = 40
CONTEXTS = {
    "env": "TOKEN_{n}={v}\n",
    "json": '{{"name": "canary", "value": "{v}"}}\n',
    "yaml": "service:\n  value: {v}\n",
    "nix": '{{ services.bot.value = "{v}"; }}\n',
    "py": "VALUE = '{v}'\n",
    "md": "Then paste `{v}` there.\n",
    "sh": 'curl -H "Authorization: Bearer {v}" https://api.invalid/\n',
    "bare": "{v}\n",
}
NAMED = {"wireguard": "PrivateKey = {v}\n", "hex-64": 'session_secret = "{v}"\n'}


def corpus_module() -> ModuleType:
    """The tests' corpus, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("guard_corpus", ROOT / "tests" / "guard_corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["guard_corpus"] = module
    spec.loader.exec_module(module)
    return module


def planted(corpus: ModuleType) -> list[tuple[str, str, bytes]]:
    """Kind, name and content of every planted token."""
    make = corpus.Maker(77)
    kinds: dict[str, Callable[[], str]] = {
        "hetzner": make.hetzner,
        "tailscale-auth": make.tailscale,
        "tailscale-client": lambda: make.tailscale("client"),
        "tailscale-api": lambda: make.tailscale("api"),
        "age": make.age,
        "discord": make.discord,
        "openai-project": lambda: f"sk-proj-{make.some(74)}T3BlbkFJ{make.some(74)}",
        "openai-old": lambda: f"sk-{make.some(20)}T3BlbkFJ{make.some(20)}",
        "anthropic": lambda: f"sk-ant-api03-{make.some(93)}AA",
        "github": make.github,
        "github-fine": lambda: f"github_pat_{make.some(22)}_{make.some(59)}",
        "telegram": lambda: f"{make.some(10, '123456789')}:AA{make.some(33)}",
        "slack": lambda: f"xoxb-{make.some(12, '123456789')}-{make.some(13, '123456789')}-{make.some(24)}",
        "crypt-6": lambda: make.crypt("6"),
        "crypt-y": lambda: make.crypt("y"),
    }
    found = [
        (kind, f"{kind}.{context}", form.format(n=number, v=value()).encode())
        for kind, value in kinds.items()
        for number, (context, form) in enumerate(CONTEXTS.items())
    ]
    found += [("wireguard", f"wireguard.{n}", NAMED["wireguard"].format(v=make.wireguard()).encode()) for n in range(8)]
    found += [("hex-64", f"hex-64.{n}", NAMED["hex-64"].format(v=make.hexed(64)).encode()) for n in range(8)]
    for openssh in (True, False):
        for form in ("plain", "yaml", "json"):
            key = make.key(openssh=openssh)
            text = {"plain": key, "yaml": "k: |\n  " + key.replace("\n", "\n  "), "json": json.dumps({"k": key})}[form]
            found.append(("private-key", f"private-key.{openssh}.{form}", text.encode()))
    return found


def ordinary_text(size_bytes: int) -> list[bytes]:
    """Source and documentation of this Python and this environment, as often as it takes."""
    roots = [
        ROOT / "clawdlets_ops",
        ROOT / "docs",
        Path(sysconfig.get_path("purelib")),
        Path(sysconfig.get_path("stdlib")),
    ]
    files, have = [], 0
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".md", ".txt", ".json", ".yaml", ".pyi", ".toml") and path.is_file():
                files.append(path.read_bytes())
                have += len(files[-1])
                if have >= size_bytes:
                    return files
    files *= -(-size_bytes // have)
    return files


def cpu_s() -> float:
    """Processor time of this process and of those it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Processor and wall seconds."""
    cpu, wall = cpu_s(), time.perf_counter()
    work()
    return cpu_s() - cpu, time.perf_counter() - wall


def pieces(path: Path) -> Iterator[bytes]:
    """A file as the guard reads it."""
    with path.open("rb", buffering=0) as handle:
        while piece := handle.read(PIECE_BYTES):
            yield piece


def run_kingfisher(program: Path, folder: Path, out: Path, *, ours: bool) -> set[str]:
    """The names of the files in which it found something."""
    rules = out / "rules.yml"
    rules.write_text(kingfisher.rule_pack())
    report = out / "report.jsonl"
    words = ["unshare", "-n" if os.geteuid() == 0 else "-rn", str(program), "scan", str(folder)]
    words += ["--no-validate", "--no-update-check", "--no-dedup", "--no-ignore", "--quiet", "--git-history", "none"]
    words += ["--format", "jsonl", "--output", str(report), "--redact", "--confidence", "low" if ours else "medium"]
    words += ["--rules-path", str(rules)] if ours else []
    done = subprocess.run(words, env={"HOME": str(out), "PATH": os.environ["PATH"]}, capture_output=True)
    assert done.returncode in (0, 200), done.stderr[-500:]
    records = [json.loads(line) for line in report.read_text(errors="replace").splitlines()]
    return {Path(record["finding"]["path"]).name for record in records if "finding" in record}


def in_files(folder: Path, contents: list[bytes], count: int | None = None) -> list[Path]:
    """``contents`` as files below ``folder``; joined to about ``count`` files of much the same size."""
    folder.mkdir()
    if count:
        target = sum(map(len, contents)) // count
        joined: list[bytes] = []
        waiting: list[bytes] = []
        for content in contents:
            for at in range(0, len(content), target):
                waiting.append(content[at : at + target])
                if sum(map(len, waiting)) >= target * 0.75:
                    joined.append(b"".join(waiting))
                    waiting = []
        contents = [*joined, b"".join(waiting)]
    files = [folder / f"{number}.txt" for number in range(len(contents))]
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    return files


def beginning(files: list[Path], size_bytes: int) -> list[Path]:
    """The first of ``files`` that have ``size_bytes`` together."""
    part, size = [], 0
    for path in files:
        if size < size_bytes:
            part.append(path)
            size += path.stat().st_size
    return part


def speed(files: list[Path], engines: dict[str, Engine], program: str | None, base: Path) -> dict[str, float]:
    """MB per CPU second of each, printed with the floors."""
    total = sum(path.stat().st_size for path in files)
    print(f"speed: {total / 1e6:.0f} MB in {len(files)} files, {KNOWN_SECRETS} known secrets")
    found: dict[str, float] = {}

    def measure(name: str, work: Callable[[], object], size: int = total) -> None:
        cpu, wall = min(timed(work) for _ in range(REPEATS))
        found[name] = size / cpu / 1e6
        print(f"  {name:32} {found[name]:8.0f} MB per CPU second, {size / wall / 1e6:8.0f} MB/s wall")

    measure("floor (reading alone)", lambda: [len(piece) for path in files for piece in pieces(path)])
    if matchers.re2 is not None:
        one = matchers.re2.Set.SearchSet()
        one.Add("tskey-")
        one.Compile()
        measure("floor (one word in RE2)", lambda: [one.Match(piece) for path in files for piece in pieces(path)])
    for name, engine in engines.items():
        part = beginning(files, SLOW_BYTES) if engine.name == "re" else files
        size = sum(path.stat().st_size for path in part)

        def work(part: list[Path] = part, engine: Engine = engine) -> None:
            scan(file_items(part, base, lambda _: None), Ground(engine), "paths")

        measure(name, work, size)
    for ours in (False, True) if program else ():
        out = Path(tempfile.mkdtemp(dir=base))
        run_kingfisher(Path(program), corpus_folder(base, {"x": b"x\n"}), out, ours=ours)  # its cache of rules
        measure(
            "kingfisher + our rules" if ours else "kingfisher",
            lambda out=out, ours=ours: run_kingfisher(Path(program), files[0].parent, out, ours=ours),  # type: ignore[misc]
        )
    ours_name = next(iter(engines))
    ratios = ", ".join(f"{found[ours_name] / value:.1f} x {name}" for name, value in found.items() if name != ours_name)
    verdict = "met" if found[ours_name] >= GOAL_MB_S else "MISSED"
    print(f"  {ours_name} is {ratios}; goal {GOAL_MB_S:.0f}: {verdict}")
    return found


def by_tests_corpus(corpus: ModuleType, engine: Engine, program: str | None, base: Path) -> None:
    """The tests' planted leaks and look-alikes, ours against the packaged scanner, which knows no paths."""
    planted_ones, innocent = (
        corpus.leaks(),
        [case for case in corpus.innocents() if case.path != ".clawdlets-guard.toml"],
    )
    cases = {f"{number:03d}": case for number, case in enumerate((*planted_ones, *innocent))}
    seen: dict[str, set[str]] = {"ours": set()}
    for name, case in cases.items():
        if scan([Item("x", [case.content], (case.path,))], Ground(engine), "paths").leaks:
            seen["ours"].add(name)
    if program:
        folder = corpus_folder(base, {name: case.content for name, case in cases.items()})
        for ours in (False, True):
            found = run_kingfisher(Path(program), folder, Path(tempfile.mkdtemp(dir=base)), ours=ours)
            seen["kingfisher + our rules" if ours else "kingfisher"] = {name.removesuffix(".txt") for name in found}
    by_path = {name for name, case in cases.items() if (case.rule or "").startswith("path-")}
    leaks = {name for name, case in cases.items() if case.rule}
    print(f"the tests' corpus: {len(leaks)} planted leaks ({len(by_path)} by path), {len(innocent)} look-alikes")
    for who, names in seen.items():
        print(
            f"  {who:24} {len(names & leaks):3}/{len(leaks)} caught, of those by content "
            f"{len(names & leaks - by_path):3}/{len(leaks - by_path)}; {len(names - leaks):2} false"
        )
    for name, case in cases.items() if os.environ.get("GUARD_TABLE") else ():
        marks = ["caught" if name in names else "-" for names in seen.values()]
        print(
            f"    {'leak' if case.rule else 'look-alike':11} {case.name:38} {'  '.join(f'{mark:8}' for mark in marks)}"
        )


def main() -> None:
    """Print speed, then recall."""
    corpus = corpus_module()
    program = shutil.which("kingfisher", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    known = [Needle(f"canary{n}", Secret(corpus.Maker(n).some(40))) for n in range(KNOWN_SECRETS)]
    engines = {"ours": Engine(known)}
    engines = {f"ours ({engines['ours'].name})": engines["ours"]}
    if matchers.re2 is not None:
        engines.setdefault("ours (re2)", Engine(known, matcher=matchers.Re2Matcher))
    engines.setdefault("ours (re)", Engine(known, matcher=matchers.ReMatcher))
    with tempfile.TemporaryDirectory(prefix="guard-benchmark-") as scratch:
        base = Path(scratch)
        text = ordinary_text(TEXT_BYTES)
        speed(in_files(base / "text", text, FILES), engines, program, base)
        speed(in_files(base / "as-found", text), engines, program, base)
        by_tests_corpus(corpus, next(iter(engines.values())), program, base)

        tokens = planted(corpus)
        innocent = [
            case
            for case in corpus.innocents()
            if not case.link and not any(rule.matches(case.path, case.content) for rule in PATH_RULES)
        ]
        everything = {name: content for _, name, content in tokens}
        everything |= {f"innocent-{number}": case.content for number, case in enumerate(innocent)}
        found: dict[str, set[str]] = {}
        for name, engine in engines.items():
            outcome = scan(
                (Item("x", [content], (path,)) for path, content in everything.items()), Ground(engine), "paths"
            )
            found[name] = {leak.path for leak in outcome.leaks}
        if program:
            folder = corpus_folder(base, everything)
            for ours in (False, True):
                out = Path(tempfile.mkdtemp(dir=base))
                found["kingfisher + our rules" if ours else "kingfisher"] = {
                    name.removesuffix(".txt") for name in run_kingfisher(Path(program), folder, out, ours=ours)
                }
        print(f"recall: {len(tokens)} planted in {len(CONTEXTS)} contexts, {len(innocent)} look-alikes")
        print(f"  {'kind':18}" + "".join(f"{name:>24}" for name in found))
        for kind in dict.fromkeys(kind for kind, _, _ in tokens):
            names = [name for each, name, _ in tokens if each == kind]
            print(
                f"  {kind:18}"
                + "".join(f"{sum(n in seen for n in names):>20}/{len(names):<3}" for seen in found.values())
            )
        print(
            f"  {'total':18}"
            + "".join(f"{sum(n in seen for _, n, _ in tokens):>20}/{len(tokens):<3}" for seen in found.values())
        )
        false = {name: sum(path.startswith("innocent-") for path in seen) for name, seen in found.items()}
        print(f"  {'false positives':18}" + "".join(f"{count:>24}" for count in false.values()))
        assert all(found[name] == found["ours (re)"] for name in engines)


def corpus_folder(base: Path, files: dict[str, bytes]) -> Path:
    """``files`` in a folder of their own."""
    folder = Path(tempfile.mkdtemp(dir=base))
    for name, content in files.items():
        (folder / f"{name}.txt").write_bytes(content)
    return folder


if __name__ == "__main__":
    main()
