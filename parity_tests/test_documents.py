"""The documents are true: examples run, figures are those of the results, and links lead on."""

from __future__ import annotations

import dataclasses
import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from alibi_spec import ALiBiConfig, Recipe, slopes
from alibi_spec.options import kind_of, meaning_of
from benchmarks import concepts
from benchmarks.render import BLOCK, MEASURED, RESULTS, rendered
from parity_tests.compare import assert_bitwise

ROOT = Path(__file__).parent.parent


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
WITH_EXAMPLES = [page for page in PAGES if ">>> " in (ROOT / page).read_text(encoding="utf-8")]


@pytest.mark.parametrize("document", WITH_EXAMPLES)
def test_examples(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `>>>` example, in order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    results = doctest.testfile(str(ROOT / document), module_relative=False, optionflags=flags)
    assert results.attempted > 4
    assert results.failed == 0


@pytest.mark.slow
def test_shardings_on_eight_devices(tmp_path: Path) -> None:
    """The example of loading.md divides a model over more devices than the other tests have."""
    page = ROOT / "docs/loading.md"
    program = (
        "import doctest, jax\n"
        "assert jax.device_count() == 8\n"
        f"results = doctest.testfile({str(page)!r}, module_relative=False)\n"
        "assert results.attempted > 4 and not results.failed"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | flags | {"PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True
    )
    assert run.returncode == 0, (run.stdout + run.stderr).decode()


def test_pages_with_examples() -> None:
    """No page has lost its examples."""
    tasks = ("README.md", "docs/attention.md", "docs/converting.md", "docs/loading.md")
    pages = {*tasks, *(f"docs/{name}.md" for name in ("models", "optimizer", "training", "SPEC"))}
    assert pages <= set(WITH_EXAMPLES)


@pytest.mark.parametrize(
    "document",
    [*PAGES, "CONTRIBUTING.md", "alibi_spec/conformance/README.md", "examples/README.md"],
)
def test_links_and_paths(document: str) -> None:
    """Every relative link, its section, and every make target that is named, exists."""
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    for link in links:
        file, _, section = link.partition("#")
        target = (ROOT / document).parent / file if file else ROOT / document
        assert target.exists(), link
        if section:
            assert section in sections_of(target), link
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, target


def sections_of(document: Path) -> set[str]:
    """What links call the sections of a document."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_listed() -> None:
    """README.md leads to each page of docs, by itself or by another page."""
    linked, new = set(), {"README.md"}
    while new:
        linked |= new
        found = {
            f"docs/{Path(link).name}"
            for page in new
            for link in re.findall(r"\]\(([^)#:]+\.md)", (ROOT / page).read_text(encoding="utf-8"))
        }
        new = (found & set(PAGES)) - linked
    assert linked == set(PAGES)


@pytest.mark.parametrize("document", PAGES)
def test_figures(document: str) -> None:
    """They are what `python -m benchmarks.render` writes."""
    text = (ROOT / document).read_text(encoding="utf-8")
    assert rendered(text) == text


def test_figures_are_rendered() -> None:
    """What stands between markers is replaced, whatever it is; an unknown figure is an error."""
    markers = "a\n<!-- begin: conversion -->\n{}<!-- end -->\nb\n"
    once = rendered(markers.format("typed by hand\n"))
    assert "| memory taken | 25 MB |" in once
    assert "typed" not in once
    assert once.startswith("a\n")
    assert once.endswith("\nb\n")
    assert rendered(once) == once
    with pytest.raises(KeyError):
        rendered("<!-- begin: absent -->\n<!-- end -->")
    begins = sum((ROOT / page).read_text(encoding="utf-8").count("<!-- begin") for page in PAGES)
    blocks = sum(len(BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))) for page in PAGES)
    assert begins == blocks > 10


def test_every_result_is_listed() -> None:
    assert {path.stem for path in RESULTS.glob("*.json")} == set(MEASURED)


@pytest.mark.parametrize("record", [ALiBiConfig, Recipe])
def test_table_of_options(record: type[ALiBiConfig | Recipe]) -> None:
    """SPEC.md §1 and §18 list what records say of their options: put there what this expects."""
    lines = ["| option | default | expected | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(record):
        default, expected = json.dumps(field.default), kind_of(field).expected
        text = f"`{field.name}` | {default} | {expected} | {meaning_of(field)}"
        lines.append(f"| {text.replace('|i - j|', 'abs(i - j)')} |")
    assert "\n".join(lines) in (ROOT / "docs/SPEC.md").read_text(encoding="utf-8")


def test_sections_that_the_code_cites_exist() -> None:
    """`SPEC.md §3` in a docstring leads somewhere."""
    sections = set(re.findall(r"^#+ (\d+(?:\.\d+)?)", (ROOT / "docs/SPEC.md").read_text(), re.M))
    cited = 0
    for package in ("spec", "convert", "torch", "flax", "verify", "train"):
        for path in (ROOT / f"alibi_{package}").rglob("*.py"):
            for citation in re.findall(r"SPEC\.md ((?:§[\d.]+[-,; ]*)+)", path.read_text()):
                for section in re.findall(r"§(\d+(?:\.\d+)?)", citation):
                    assert section in sections, f"{path.name} cites §{section}"
                    cited += 1
    assert cited > 10


def test_pictures_of_concepts(tmp_path: Path) -> None:
    """`python -m benchmarks.concepts` writes every picture that the page shows, and small ones."""
    assert concepts.main(["--output", str(tmp_path / "new")]) == 0
    shown = re.findall(r"\]\(concepts/(.+)\)", (ROOT / "docs/concepts.md").read_text("utf-8"))
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(shown)
    for folder in (tmp_path / "new", ROOT / "docs/concepts"):
        for name in shown:
            picture = (folder / name).read_bytes()
            assert picture.startswith(b"\x89PNG")
            assert len(picture) < 100_000


def test_what_the_pictures_of_concepts_show() -> None:
    """Biases are −m · distance; no query of a call needs more keys than the weights allow."""
    axes = concepts.bias_picture().axes[0]
    for line, slope in zip(axes.lines, slopes(concepts.HEADS), strict=True):
        distances, biases = (np.asarray(each) for each in line.get_data())
        assert_bitwise(biases, slope * (-distances).astype(np.float32), str(line.get_label()))
    (axes,) = concepts.windows_picture().axes
    marks, bars = axes.collections
    most = np.array([segment[:, 1].max() for segment in bars.get_segments()])
    assert (most < marks.get_offsets()[:, 1]).all()
    plt.close("all")
