"""The documents are true: examples of SPEC.md and README.md run, and what they name exists."""

from __future__ import annotations

import dataclasses
import doctest
import json
import re
from pathlib import Path

import pytest

from alibi_spec import ALiBiConfig
from alibi_spec.options import kind_of, meaning_of

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("document", ["docs/SPEC.md", "docs/attention.md", "README.md"])
def test_examples(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `>>>` example, in order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    results = doctest.testfile(str(ROOT / document), module_relative=False, optionflags=flags)
    assert results.attempted > 4
    assert results.failed == 0


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "docs/SPEC.md", "docs/attention.md"]
)
def test_links_and_paths(document: str) -> None:
    """Every relative link, and every file or make target that is named, exists."""
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    for link in links:
        assert (ROOT / document).parent.joinpath(link).exists(), link
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, target


def test_table_of_options() -> None:
    """SPEC.md §1 lists what `ALiBiConfig` says of its options: put there what this expects."""
    lines = ["| option | default | expected | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(ALiBiConfig):
        default, expected = json.dumps(field.default), kind_of(field).expected
        text = f"`{field.name}` | {default} | {expected} | {meaning_of(field)}"
        lines.append(f"| {text.replace('|i - j|', 'abs(i - j)')} |")
    assert "\n".join(lines) in (ROOT / "docs/SPEC.md").read_text(encoding="utf-8")


def test_sections_that_the_code_cites_exist() -> None:
    """`SPEC.md §3` in a docstring leads somewhere."""
    sections = set(re.findall(r"^#+ (\d+(?:\.\d+)?)", (ROOT / "docs/SPEC.md").read_text(), re.M))
    cited = 0
    for package in ("alibi_spec", "alibi_convert", "alibi_torch", "alibi_flax", "alibi_verify"):
        for path in (ROOT / package).rglob("*.py"):
            for citation in re.findall(r"SPEC\.md ((?:§[\d.]+[-,; ]*)+)", path.read_text()):
                for section in re.findall(r"§(\d+(?:\.\d+)?)", citation):
                    assert section in sections, f"{path.name} cites §{section}"
                    cited += 1
    assert cited > 10
