"""Every planted fault can be planted, and selects tests: a row that rots is seen at once."""

from __future__ import annotations

import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from _pytest.mark import KeywordMatcher
from _pytest.mark.expression import Expression

from parity_tests.conftest import COLLECTED
from parity_tests.meta import mutants
from parity_tests.meta.faults import FAULTS
from parity_tests.meta.mutant import Mutant
from parity_tests.meta.mutants import ROOT


def _is_plantable(mutant: Mutant) -> bool:
    code = (ROOT / mutant.file).read_text(encoding="utf-8")
    return mutant.before in code and mutant.before != mutant.after


def test_faults_can_be_planted() -> None:
    assert [mutant.fault for mutant in FAULTS if not _is_plantable(mutant)] == []
    assert len({mutant.fault for mutant in FAULTS}) == len(FAULTS)


def test_the_tests_are_there(request: pytest.FixtureRequest) -> None:
    """pytest's own -k, on all tests that the rows name: of this run, and of files that it left."""
    selections = sorted({mutant.tests for mutant in FAULTS})
    items: dict[Path, list[pytest.Item]] = defaultdict(list)
    for item in request.config.stash[COLLECTED]:
        items[item.path].append(item)
    files = {ROOT / "parity_tests" / shlex.split(each)[0] for each in selections} - set(items)
    if files:
        collected = _Collected()
        # In this process, which has imported what they need. Its options are not those of this run.
        options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:xdist"]
        assert pytest.main([*options, *map(str, files)], [collected]) == 0
        for item in collected.items:
            items[item.path].append(item)
    assert [each for each in selections if not selects(each, items)] == []


class _Collected:
    """A plugin that keeps what was collected."""

    items: Sequence[pytest.Item] = ()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def selects(tests: str, items: Mapping[Path, Sequence[pytest.Item]]) -> bool:
    """Whether a row's `tests`, a file and perhaps -k with an expression, select any of these."""
    file, *options = shlex.split(tests)
    expression = Expression.compile(options[1] if options else "")
    assert options[:1] in ([], ["-k"])
    return any(
        not options or expression.evaluate(KeywordMatcher.from_item(item))
        for item in items[ROOT / "parity_tests" / file]
    )


def test_a_whole_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Survivors, too; what was only a part of the faults is not."""
    first, second = FAULTS[:2]
    troubles = {first: None, second: "0: all passed"}
    for name, value in {
        "FAULTS": (first, second),
        "RESULTS": tmp_path / "mutants.json",
        "healthy": lambda _: None,
        "survival": troubles.get,
        "commit": lambda: "abc",
    }.items():
        monkeypatch.setattr(mutants, name, value)
    monkeypatch.setattr(sys, "argv", ["mutants", *first.fault.split()])
    assert mutants.main() == 0
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["mutants"])
    assert mutants.main() == 1
    results = json.loads((tmp_path / "mutants.json").read_text())
    assert results["commit"] == "abc"
    assert [(row["fault"], row["file"], row["outcome"]) for row in results["faults"]] == [
        (first.fault, first.file, "caught"),
        (second.fault, second.file, "survived"),
    ]
