"""What commands print: the lines of an inspection, a plan, a report, a check."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from alibi_convert import Plan, Report
    from alibi_verify import Check, Parity, Run, Skipped
    from alibi_verify.conformance import Conformance, Outcome

COMPARED = 10  # vectors, at most, that are compared with one another
_LISTED = 20  # tensors, at most, in which checkpoints differ
_BRANCHES = ("biased_logits", "attn", "ffn")  # of a layer, before its result


def print_json(value: Any) -> None:
    """A result as JSON, for `--json`."""
    print(json.dumps(value, indent=2))


def print_lines(lines: Iterator[str]) -> None:
    """Lines as they come."""
    for line in lines:
        print(line)


def check_line(check: Check) -> str:
    """One check of a verification: whether it passed, and what was measured."""
    return f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.measured}"


def outcome_line(outcome: Outcome) -> str:
    """One case of the kit: whether it passed, and what was measured."""
    words = {"ok": "ok  ", "failed": "FAIL", "refused": "-   "}
    return f"{words[outcome.status]} {outcome.case}: {outcome.found}"


def conformance_lines(result: Conformance) -> Iterator[str]:
    """What an implementation can claim."""
    yield f"{result.implementation}, {result.dtype} on {result.device}"
    by_verdict: dict[str, list[str]] = {}
    for level, verdict in result.levels.items():
        by_verdict.setdefault(verdict, []).append(level)
    for verdict, levels in by_verdict.items():
        yield f"  {verdict}: {', '.join(levels)}"


def inspection_lines(contents: Mapping[str, Any]) -> Iterator[str]:
    """What a checkpoint holds."""
    from alibi_spec import ALiBiConfig

    yield f"{contents['path']}: {contents['model']}, {contents['family']} ({contents['format']})"
    yield f"{contents['parameters']:,} parameters, {contents['nbytes']:,} bytes"
    yield "configuration (*: not the default):"
    defaults = ALiBiConfig().to_dict()
    for name, value in contents["config"].items():
        yield f"  {name} = {value}" + ("" if value == defaults[name] else "  *")
    width = max(map(len, contents["tensors"]))
    for name, tensor in contents["tensors"].items():
        yield f"  {name:{width}}  {tensor['dtype']:9} {tensor['shape']}"
    yield from _wrappers(contents["wrappers"])
    yield from _adapter(contents["adapter"])
    for name, reason in contents["derived"].items():
        yield f"  {name:{width}}  dropped: {reason}"
    yield from _ignored(contents["ignored"])


def plan_lines(planned: Plan) -> Iterator[str]:
    """What a conversion would do."""
    yield (
        f"{planned.source} ({planned.family}, {planned.source_format}) -> "
        f"{planned.destination_format}"
    )
    for name, value in planned.config.items():
        yield f"  {name} = {value}"
    width = max(map(len, planned.tensors))
    for name, row in planned.tensors.items():
        dtype = row.dtype if row.dtype == row.source_dtype else f"{row.source_dtype} -> {row.dtype}"
        origin = "" if row.sources == (name,) else f"  from {', '.join(row.sources)}"
        yield f"  {name:{width}}  {dtype} {list(row.shape)} {row.nbytes:,} bytes{origin}"
    yield from _adapter(planned.adapter)
    yield from _optimizer(planned.optimizer)
    yield from _differences(planned.dropped, planned.folded)
    yield from _ignored(planned.ignored)
    for file, names in planned.files.items():
        yield f"{file}: {len(names)} tensors"
    free = planned.free_disk_bytes
    free_text = "unknown" if free is None else f"{free:,}"
    yield (
        f"{planned.nbytes:,} bytes to write, {free_text} free; "
        f"about {planned.peak_memory_bytes:,} bytes of memory"
    )
    for problem in planned.problems:
        yield f"{'problem' if problem.stops else 'note'}: {problem.cause}; {problem.mend}"


def report_lines(report: Report) -> Iterator[str]:
    """What a conversion did."""
    yield (
        f"{report.source} ({report.family}, {report.source_format}) -> "
        f"{report.destination} ({report.destination_format})"
    )
    yield f"{report.tensors} tensors, {report.nbytes:,} bytes, {report.seconds:.1f} s"
    yield from _wrappers(report.wrappers)
    yield from _adapter(report.adapter)
    yield from _optimizer(report.optimizer)
    yield from _differences(report.dropped, report.folded)
    yield from _ignored(report.ignored)
    for cast in report.casts:
        where = f" in {cast.where}" if cast.where else ""
        yield (
            f"{cast.tensors} tensors cast from {cast.source} to {cast.target}: largest relative "
            f"rounding error {cast.rounding:.1e}{where}"
        )
    for name, elements in report.nonfinite.items():
        yield f"  NaN or infinite: {elements:,} elements of {name}"
    if report.kept:
        yield f"kept from the interrupted conversion: {', '.join(report.kept)}"
    if report.copied:
        yield f"copied: {', '.join(report.copied)}"
    if report.left_behind:
        yield f"not copied: {', '.join(report.left_behind)}"
    for name, xxh3 in report.destination_xxh3.items():
        yield f"  xxh3 {xxh3}  {name}"
    if report.verified:
        yield "read back: bitwise as expected"
        yield from _outputs(report.verification["logits"])
    else:
        yield "not read back"


def checkpoint_difference_lines(parity: Parity) -> Iterator[str]:
    """In what the configuration and the parameters of B differ from those of A."""
    if parity.ours is parity.theirs:
        return
    for name, (ours, theirs) in parity.settings.items():
        yield f"  {name} = {theirs!r}, in A {ours!r}"
    found = parity.parameters
    every, ours = len(parity.ours.tensors), parity.ours.path
    yield f"  {len(found)} of {every} parameters differ from those of A, {ours}"
    width = max(map(len, found), default=0)
    for name, each in list(found.items())[:_LISTED]:
        yield (
            f"    {name:{width}}  {each.elements:,} of {each.size:,} elements, "
            f"by {each.largest:.1e} at most"
        )
    if len(found) > _LISTED:
        yield f"    and {len(found) - _LISTED} more"


def run_lines(run: Run) -> Iterator[str]:
    """What one implementation computed: the errors of its tensors, and why they are too large."""
    worst = max(run.errors, key=lambda name: run.errors[name])
    measured = f"worst {run.errors[worst]:.1e} ({worst}), {run.budget:g} is allowed"
    yield f"{'ok  ' if run.passed else 'FAIL'} {run.name}, {run.dtype}: {measured}"
    yield f"       layer{''.join(f'{name:>15}' for name in (*_BRANCHES, 'result'))}"
    for stage in run.by_stage:
        result = f"layers.{stage}" if stage.isdigit() else stage
        names = (*(f"{result}.{branch}" for branch in _BRANCHES), result)
        yield f"  {stage:>10}{''.join(f'{_error(run, name):>15}' for name in names)}".rstrip()
    if run.first is not None:
        place = run.places[run.first]
        where = [f"row {place.row}", f"position {place.position}"]
        where += [] if place.key is None else [f"key {place.key}"]
        where += [] if place.head is None else [f"head {place.head}"]
        yield f"  first past its budget: {run.first}, most at {', '.join(where)}"
        yield from _causes(run)
    if run.gradients:
        name = max(run.gradients, key=lambda name: run.gradients[name])
        yield (
            f"  gradients of {len(run.gradients)} parameters: worst {run.gradients[name]:.1e} "
            f"({name}), {run.gradient_budget:g} is allowed"
        )
    if run.first_gradient is not None:
        yield f"  first gradient past its budget, from the end: {run.first_gradient}"


def _error(run: Run, name: str) -> str:
    """The error of a tensor, marked if it is past the budget."""
    if name not in run.errors:
        return "- "
    error = run.errors[name]
    return f"{error:.1e}{' ' if error <= run.budget else '!'}"


def _causes(run: Run) -> Iterator[str]:
    causes = run.causes
    if "embedding" not in run.errors:
        yield "  cause: not sought, where only logits are seen"
    elif not causes:
        yield "  cause: no known mistake explains it"
    elif not causes[0].reproduces:
        yield f"  cause: like {causes[0].words}"
        yield f"    (with this mistake the deviations are {causes[0].reduction:,.0f} times smaller)"
    else:
        yield f"  cause: {causes[0].words} (with this mistake: {causes[0].error:.1e})"
        for each in causes[1:]:
            yield f"    or: {each.words} ({each.error:.1e})"


def parity_summary_lines(runs: Sequence[Run], skipped: Sequence[Skipped]) -> Iterator[str]:
    """How many passed, and what was not run."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in skipped:
        reasons.setdefault((each.name, each.reason), []).append(each.dtype or "")
    for (name, reason), dtypes in reasons.items():
        of_dtypes = "" if dtypes == [""] else f" in {', '.join(dtypes)}"
        yield f"not run: {name}{of_dtypes} ({reason})"
    passed = sum(run.passed for run in runs)
    yield f"{passed} of {len(runs)} runs within their budgets"


def vector_lines(vectors: np.ndarray, output: Path | None) -> Iterator[str]:
    """How many vectors there are, and where, or else how alike a few of them are."""
    count, width = vectors.shape
    shape = f"{count:,} {'vector' if count == 1 else 'vectors'} of {width:,} numbers"
    yield shape if output is None else f"{shape}: {output}"
    if output is None and 2 <= count <= COMPARED:
        yield "cosine similarities:"
        wide = vectors.astype("float64")
        lengths = (wide**2).sum(axis=1) ** 0.5
        for row in wide @ wide.T / lengths / lengths[:, None]:
            yield "".join(f"{value:9.4f}" for value in row)


def filled_lines(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Texts, and the tokens that may stand for their masks."""
    for result in results:
        yield result["text"]
        for number, mask in enumerate(result["masks"], 1):
            yield f"  mask {number}:"
            for each in mask["candidates"]:
                yield f"    {each['probability']:.4f}  {each['text']!r}"


def _wrappers(wrappers: Sequence[str]) -> Iterator[str]:
    if wrappers:
        yield f"  removed from the names: {', '.join(wrappers)}"


def _adapter(adapter: Mapping[str, Any]) -> Iterator[str]:
    if adapter:
        scalings = ", ".join(f"{each:g}" for each in adapter["scalings"]) or "none"
        yield (
            f"adapter {adapter['path']} (of {adapter['base']!r}): added to {adapter['added']} "
            f"tensors, in place of {adapter['replaced']}; scaling {scalings}"
        )
        if adapter["untied"] is not None:
            yield f"  {adapter['untied']} is no longer the token embedding"


def _optimizer(optimizer: Mapping[str, Any]) -> Iterator[str]:
    if optimizer:
        step = "an unknown number of" if optimizer["step"] is None else f"{optimizer['step']:,}"
        moments = " and ".join(optimizer["moments"])
        yield (
            f"optimizer: {optimizer['kind']} after {step} updates; {moments} of "
            f"{optimizer['parameters']} parameters, {optimizer['nbytes']:,} bytes"
        )


def _differences(dropped: Mapping[str, str], folded: Mapping[str, str]) -> Iterator[str]:
    for name, reason in dropped.items():
        yield f"  dropped: {name} ({reason})"
    for name, reason in folded.items():
        yield f"  computed: {name} ({reason})"


def _ignored(ignored: Mapping[str, Any]) -> Iterator[str]:
    for name, value in ignored.items():
        yield f"  ignored: {name}={value!r}"


def _outputs(logits: Mapping[str, Any]) -> Iterator[str]:
    """How far the outputs of both sides of a conversion differ."""
    if "not_run" in logits:
        yield f"outputs not compared: {logits['not_run']}"
        return
    errors = ", ".join(f"{name} {error:.1e}" for name, error in logits["errors"].items())
    limit = f"{logits['dtype']}, {logits['budget']:.0e} is allowed"
    yield f"outputs against {logits['against']}: {errors} ({limit})"
    if "no_peer" in logits:
        yield f"  its own library was not run: {logits['no_peer']}"
