"""One table of every option, made from both sides; and that no fact is written in Nix and in Python."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from clawdlets_ops.doctor.of_clone import references
from clawdlets_ops.fleet import Host, json_schema
from tests.nix_side import NIX, ROOT, needs_nix, nix

pytestmark = pytest.mark.contract

PAGE = ROOT / "docs" / "reference" / "options.md"
NOT_SET = "(to be set)"
WALK = """
let
  inherit (builtins) attrNames concatMap;
  lib = (import ./eval/lib.nix).lib;
  inner = path: type: if type ? options then walk path type.options else if type ? maybe then inner path type.of
    else if type ? of then inner "${path}.<name>" type.of else [ ];
  walk = path: tree: concatMap (name: let option = tree.${name}; at = if path == "" then name else "${path}.${name}"; in
    if option ? _type then [ { inherit at; default = option.default or "(to be set)"; } ] ++ inner at option.type else walk at option) (attrNames tree);
in walk "" ((import ./fleet.nix).hostOptions lib)
"""


def _models(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """The models in a field's type, and whether they are the values of a map."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, False
    for argument in get_args(annotation):
        for model, _ in _models(argument):
            yield model, get_origin(annotation) is dict or any(True for _, inside in _models(argument) if inside)


def of_python(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Key path, attribute and default of every field that is a value."""
    for name, field in model.model_fields.items():
        at = f"{path}.{field.alias}" if path else str(field.alias)
        below = list(_models(field.annotation))
        if below and not below[0][1] and isinstance(field.annotation, type):
            yield from of_python(below[0][0], at)
            continue
        default = (
            NOT_SET
            if field.is_required()
            else to_jsonable_python(field.get_default(call_default_factory=True), by_alias=True)
        )
        yield at, f"{model.__name__}.{name}", default
        if below:
            yield from of_python(below[0][0], f"{at}.<name>")


def of_nix() -> dict[str, Any]:
    return {one["at"]: one["default"] for one in nix(WALK)}


def _accepts() -> dict[str, str]:
    """What a field takes, by key path below a host, as the schema has it."""
    schema = json_schema()
    found: dict[str, str] = {}

    def walk(part: dict[str, Any], path: str) -> None:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        if "anyOf" in part:
            return walk(next(one for one in part["anyOf"] if one.get("type") != "null"), path)
        if "enum" in part:
            found[path] = ", ".join(part["enum"])
        elif part.get("type") == "integer":
            found[path] = f"{part.get('minimum', '')} to {part.get('maximum', '')}"
        elif part.get("type") == "array":
            found[path] = "a list"
        elif part.get("patternProperties"):
            found[path] = "by name"
            for below in part["patternProperties"].values():
                walk(below, f"{path}.<name>")
        else:
            found[path] = {"boolean": "true, false", "string": "text"}.get(part.get("type", ""), "")
        for key, below in part.get("properties", {}).items():
            if not key.startswith("$"):
                walk(below, f"{path}.{key}" if path else key)
        return None

    walk(schema["$defs"]["Host"], "")
    return found


def page() -> str:
    nixos, accepts = of_nix(), _accepts()
    rows = [
        f"| `clawdlets.{at}` | `hosts.<host>.{at}` | {accepts[at]} | `{json.dumps(default)}` | `{attribute}` | `{json.dumps(nixos.get(at))}` |"
        for at, attribute, default in of_python(Host)
    ]
    return "\n".join(
        [
            "# Every option of a host, on both sides",
            "",
            "Made by `tests/contract/test_nix_options.py` (`CLAWDLETS_WRITE_DOCS=1` writes it anew): the third to fifth column as",
            "Python's models have them, the last as Nix evaluates `options.clawdlets`. What each is for: the descriptions in",
            "`fleet/clawdlets.schema.json`, which an editor shows.",
            "",
            "| NixOS option | fleet file | takes | default | Python | default in Nix |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


@needs_nix
def test_both_sides_have_the_same_options_with_the_same_defaults() -> None:
    ours = {at: default for at, _, default in of_python(Host)}
    assert len(ours) > 40
    assert of_nix() == ours


@needs_nix
def test_the_table_of_options_is_current() -> None:
    if os.environ.get("CLAWDLETS_WRITE_DOCS"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()


def modules() -> list[Path]:
    return sorted(path for path in [*NIX.rglob("*.nix"), ROOT / "flake.nix"] if "eval" not in path.parts)


def written_twice(nix_text: str, python_text: str) -> list[str]:
    """Paths, addresses, large numbers, and values of the fleet file's enums and defaults that Nix spells out and Python does
    too. A comparison with a value of an enum is none: of a value that no enum has, the modules' tests would tell."""
    code = "\n".join(re.sub(r"(^|\s)#.*", "", line) for line in nix_text.splitlines())
    words = set(re.findall(r'"(/[a-z][\w./-]{3,}|\d{1,3}(?:\.\d{1,3}){3}(?:/\d+)?)"', code))
    words |= set(re.findall(r"(?<![\w.\"])(\d{4,})(?![\w.])", code))
    python = set(re.findall(r"[\"'](/[a-z][\w./-]{3,}|\d{1,3}(?:\.\d{1,3}){3}(?:/\d+)?)[\"']", python_text))
    python |= set(re.findall(r"(?<![\w.\"])(\d{4,})(?![\w.])", python_text))
    facts = {
        value
        for part in json_schema()["$defs"].values()
        for field in part.get("properties", {}).values()
        for value in _facts(field)
    }
    spelt = set(re.findall(r'(?<![=!]= )(?<![=!]=)"([\w./-]{4,})"', code))
    return sorted((words & python) | (spelt & facts))


def _facts(field: dict[str, Any]) -> Iterator[str]:
    yield from field.get("enum", ())
    if isinstance(field.get("default"), str):
        yield field["default"]


# Words that NixOS has for something else than the fleet file.
MEANT_OTHERWISE = {
    ("cattle.nix", "ext4"),  # the root file system; in the fleet file that of a volume
    ("host.nix", "ext4"),
    ("host.nix", "0077"),  # of the boot partition; in Python a word of advice about the orchestrator's unit
    ("host.nix", "root"),  # a user whom NixOS has; in the fleet file the owner of a secret by default
    ("orchestrator.nix", "root"),
    ("secrets.nix", "root"),
    ("options.nix", "clawdlets"),  # the option; in the fleet file a prefix of OpenTofu's state
    ("tailscale.nix", "none"),  # no routing
}


def test_no_fact_is_written_in_both_languages() -> None:
    python = "\n".join(path.read_text() for path in (ROOT / "clawdlets_ops").rglob("*.py") if "lab" not in path.parts)
    spelt = {(path.name, fact) for path in modules() for fact in written_twice(path.read_text(), python)}
    found = sorted(spelt - MEANT_OTHERWISE)
    assert MEANT_OTHERWISE - spelt == set()
    lines = sum(len(path.read_text().splitlines()) for path in modules())
    print(f"{len(modules())} files, {lines} lines of Nix; {len(found)} facts in two places: {found}")  # noqa: T201 - a figure for whoever runs with -s
    assert found == []


@pytest.mark.parametrize(
    ("nix_text", "python_text", "caught"),
    [
        ('x = "/var/lib/sops-nix";', 'X = "/var/lib/sops-nix"', ["/var/lib/sops-nix"]),
        ("port = 41641;", "PORT = 41641", ["41641"]),
        ('mode = "smtp-only";', "", ["smtp-only"]),
        ('a = "169.254.169.254";', 'A = "169.254.169.254"', ["169.254.169.254"]),
        ('c = m == "smtp-only"; # "/var/lib/sops-nix" 41641', 'X = "/var/lib/sops-nix"; PORT = 41641', []),
    ],
)
def test_the_count_finds_what_is_written_twice(nix_text: str, python_text: str, caught: list[str]) -> None:
    assert written_twice(nix_text, python_text) == caught


def test_nothing_here_refers_to_a_flake_by_path() -> None:
    shipped = [
        path
        for path in (ROOT / "clawdlets_ops").rglob("*")
        if path.suffix in ("", ".in", ".yml", ".md", ".py") and path.is_file()
    ]
    texts = [
        *modules(),
        *sorted((ROOT / ".github").rglob("*.yml")),
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "README.md",
        *shipped,
    ]
    assert [
        f"{path}:{line}"
        for path in texts
        if "guard" not in path.parts and "doctor" not in path.parts
        for line, _ in references(path.read_bytes())
    ] == []
    assert list(references(b'inputs.clawdlets.url = "path:../clawdlets";'))
