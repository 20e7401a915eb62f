"""The figures of the documents, from the files of results: `python -m benchmarks.render`.

The text between `<!-- begin: NAME ARGUMENT … -->` and `<!-- end -->` of a document is the result of
the function NAME in `FIGURES`; `parity_tests/test_documents.py` compares them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from parity_tests.pairs import READERS, WRITERS, is_refused

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LENGTHS = (2_048, 4_096, 16_384, 32_768, 65_536)
PASSES = {"forward": "forward", "both": "forward and backward"}
BLOCK = re.compile(r"(<!-- begin: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)

# The peers of each file, in the order of the tables, and what the documents call them.
PEERS = {
    "torch": {
        "alibi_torch, aten_flash": "`aten_flash`",
        "alibi_torch, blockwise": "`blockwise`",
        "sdpa, causal, no bias": "`scaled_dot_product_attention`, causal, **no bias**",
        "FlexAttention, compiled": "FlexAttention, compiled",
        "sdpa with a materialised bias": "`scaled_dot_product_attention`, bias as a matrix",
        "alibi_torch, dense": "`dense`",
        "jaketae/alibi": "jaketae/alibi",
        "x-transformers": "x-transformers",
        "transformers BLOOM": "transformers' BLOOM",
        "transformers MPT": "transformers' MPT",
    },
    "flax": {
        "alibi_flax, blockwise": "`blockwise`",
        "alibi_flax, dense": "`dense`",
        "jax.nn with a bias": "`jax.nn.dot_product_attention`, bias as a matrix",
        "flax.linen with a bias": "`flax.linen.dot_product_attention`, bias as a matrix",
    },
}
STEPS = {
    "seed": "jaketae/alibi's default model, by its own formulas",
    "ours": "the same model, ours",
    "no dropout on probabilities": "`ALiBiConfig()`, no dropout on probabilities",
    "dropout on probabilities": "`ALiBiConfig()`, dropout on probabilities",
}

# What each file of results is, the page with its figures, and the command that writes it.
MEASURED = {
    "attention_torch": (
        "attention in PyTorch",
        "attention",
        "make bench-attention",
    ),
    "attention_flax": ("attention in Flax", "attention", "make bench-attention"),
    "training_torch": (
        "a step of training with each attention",
        "attention",
        "make bench-attention",
    ),
    "training_flax": ("training with each attention in Flax", "attention", "make bench-attention"),
    "inference": ("reading and continuing prompts", "generating", "make bench-inference"),
    "training": ("steps of training beside other trainers", "training", "make bench-training"),
    "rates_demo": ("learning rates of the demo", "demo", "python -m benchmarks.learning_rates"),
    "rates_extrapolate": (
        *("learning rates of `alibi extrapolate`", "extrapolation"),
        "python -m benchmarks.learning_rates",
    ),
    "conversion": ("converting 8 GB", "converting", "make bench"),
    "sharded_loading": (
        *("opening 8 GB on eight devices", "parallel"),
        "python -m benchmarks.sharded_loading",
    ),
    "compile_time": ("compilation by depth", "parallel", "python -m benchmarks.compile_time"),
    "tpu_meshes": ("what TPU programs need", "parallel", "python -m benchmarks.tpu_meshes"),
    "precision": ("products of each device, emulated", "devices", "python -m benchmarks.precision"),
    "llama_cpp": ("our files in llama.cpp", "gguf", "python -m benchmarks.llama_cpp"),
    "mutants": ("planted faults, and which were caught", "guarantee", "make mutants"),
}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def attention(backend: str, passes: str, field: str) -> str:
    """Milliseconds ("seconds") or MB ("extra_bytes") of every peer: float32, normal inputs."""
    pass_name = PASSES[passes]
    unit, factor = {"seconds": ("ms", 1e3), "extra_bytes": ("MB", 1e-6)}[field]
    found = {
        (row["peer"], row["seq"]): row[field]
        for row in _read(f"attention_{backend}")["rows"]
        if field in row
        and (row["dtype"], row["inputs"], row["pass"]) == ("float32", "normal", pass_name)
    }
    rows = [
        [label, *(_number(found.get((peer, seq)), factor) for seq in LENGTHS)]
        for peer, label in PEERS[backend].items()
        if any((peer, seq) in found for seq in LENGTHS)
    ]
    return table([f"{pass_name}, {unit}", *(f"{seq:,}" for seq in LENGTHS)], rows)


def other_inputs(backend: str) -> str:
    """Times of our first kernel for other inputs."""
    ours = next(iter(PEERS[backend]))
    found = {
        (row["dtype"], row["inputs"], row["pass"], row["seq"]): row["seconds"]
        for row in _read(f"attention_{backend}")["rows"]
        if row["peer"] == ours and "seconds" in row
    }
    kinds = {
        ("float32", "normal"): "float32, normal",
        ("bfloat16", "normal"): "bfloat16, normal",
        ("float32", "trained-like"): "float32, trained-like",
    }
    rows = [
        [label, *(_number(found.get((*kind, PASSES["forward"], seq)), 1e3) for seq in LENGTHS)]
        for kind, label in kinds.items()
    ]
    return table(["inputs, forward, ms", *(f"{seq:,}" for seq in LENGTHS)], rows)


def goals(*names: str) -> str:
    """The goals in files of results, and what was found."""
    rows = [goal for name in names for goal in _read(name)["goals"]]
    cells = ((row["goal"], _figure(row["found"]), _sign(row), _verdict(row)) for row in rows)
    return table(("", "found", "wanted", ""), cells)


def measured() -> str:
    """Every file of results: what, when, on what, by which command, and where its figures are."""
    rows = []
    for name, (what, page, command) in MEASURED.items():
        results = _read(name)
        machine = results.get("machine")
        place = f"{machine['cpu']}, {machine['cores']} cores" if machine else ""
        facts = (results["date"][:10], place, f"`{command}`", f"[{page}.md]({page}.md)")
        rows.append((f"[{what}](../benchmarks/results/{name}.json)", *facts))
    return table(("", "measured", "on", "by", "figures in"), rows)


def products(backend: str) -> str:
    """The bare products of a call's blocks."""
    found = _read(f"attention_{backend}")["bare_products_of_one_forward"]
    header = ("bare products of one forward call", "ms", "share of our call")
    row = (f"N={found['seq']}", _number(found["seconds"], 1e3), f"{found['share_of_ours']:.0%}")
    return table(header, [row])


def training(backend: str) -> str:
    """Steps of training: time and memory."""
    steps = _read(f"training_{backend}")["training_step"]
    rows = []
    for name, label in STEPS.items():
        if name in steps:
            step = steps[name]
            memory = step.get("peak_extra_bytes", step.get("extra_bytes"))
            cells = f"{step['seq']:,}", f"{step['seconds']:.2f}", _number(memory, 1e-6)
            rows.append([label, *cells])
    return table(("training step", "positions", "s", "MB"), rows)


def trainers() -> str:
    """A step of training of every peer: time, memory, and the share of the products in ours."""
    rows = _read("training")["rows"]
    found = {(row["peer"], row["model"], row["seq"]): row for row in rows}
    cases = list(dict.fromkeys(key[1:] for key in found))

    def cell(peer: str, case: tuple[str, int]) -> str:
        row = found.get((peer, *case))
        if row is None:
            return "–"
        if row["peak_extra_bytes"] is None:
            return f"{row['seconds']:.2f}"
        return f"{row['seconds']:.2f} / {_number(row['peak_extra_bytes'], 1e-6)}"

    lines = [
        [peer, *(cell(peer, case) for case in cases)]
        for peer in dict.fromkeys(key[0] for key in found)
    ]
    header = (f"{model}, {seq:,}" for model, seq in cases)
    return f"{table(('a step, s / MB', *header), lines)}\n{origin('training')}"


def inference() -> str:
    """Time of continuing and of reading prompts, of every peer."""
    results = _read("inference")
    found = {(row["peer"], row["kind"], row["batch"], row["seq"]): row for row in results["rows"]}
    cases = [key[1:] for key in found if key[0] == "alibi_torch" and key[1] != "step"]
    labels = {"decode": "128 new tokens after 128, batch {}, s", "prefill": "prompt of {1:,}, s"}
    header = ["", *(labels.get(kind, "its products, s").format(*rest) for kind, *rest in cases)]
    rows = []
    for peer in dict.fromkeys(key[0] for key in found if key[1] == "decode"):
        cells = (found.get((peer, *case)) for case in cases)
        rows.append([peer, *("–" if row is None else f"{row['seconds']:.2f}" for row in cells)])
    return f"{table(header, rows)}\n{origin('inference')}"


def origin(name: str) -> str:
    """When, on what and with which versions a file of results was measured."""
    results = _read(name)
    machine = results["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    file = f"[{name}.json](../benchmarks/results/{name}.json)"
    return (
        f"{file}: {results['date'][:10]}, {machine['cpu']}, {machine['cores']} cores; {versions}.\n"
    )


def conversion() -> str:
    """Time and memory of converting a large checkpoint."""
    results = _read("conversion")
    facts = {
        "checkpoint": f"{results['nbytes'] / 1e9:.1f} GB, {results['source']}",
        "largest tensor": f"{results['largest_tensor_bytes'] / 1e6:.0f} MB",
        "limit of memory": f"{results['memory_limit_bytes'] / 1e9:.0f} GB",
        "memory taken": f"{results['peak_anonymous_bytes'] / 1e6:.0f} MB",
    }
    for name, seconds in results["median_seconds"].items():
        speed = results["speed_relative_to_cp"][name]
        facts[f"`{name}`" if name == "cp" else name] = f"{seconds:.1f} s, {speed:.2f} × cp's speed"
    return table(("", ""), facts.items())


def demo() -> str:
    """Means and spreads of the demo's curves, and how it was run."""
    report = json.loads((ROOT / "docs" / "demo" / "report.json").read_text())
    curves = [curve for curve in report["bits_per_byte"] if curve["backend"] == "PyTorch"]
    rows = [
        [
            curve["positions"],
            f"{report['learning_rates'][curve['positions']]:g}",
            *(
                f"{mean:.3f} ± {curve['spread'][length]:.3f}"
                for length, mean in curve["mean"].items()
            ),
        ]
        for curve in curves
    ]
    options = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    header = ("bits per byte at length", "learning rate", *curves[0]["mean"])
    origin = f"{report['date']}, {report['machine']}; {versions}; options: {options}."
    return f"{table(header, rows)}\n{origin}\n"


def mutants() -> str:
    """The planted faults by the folder of the code, and how many the tests caught."""
    results = _read("mutants")
    folders = [str(Path(row["file"]).parent) for row in results["faults"]]
    caught = Counter(
        folder
        for folder, row in zip(folders, results["faults"], strict=True)
        if row["outcome"] == "caught"
    )
    planted = Counter(folders)
    lines = [[f"`{name}`", str(planted[name]), str(caught[name])] for name in sorted(planted)]
    lines.append(["all", str(planted.total()), str(caught.total())])
    file = "[mutants.json](../benchmarks/results/mutants.json)"
    origin = f"{file}: {results['date'][:10]}, commit {results['commit'][:10]}.\n"
    return f"{table(('faults planted in', 'planted', 'caught'), lines)}\n{origin}"


def pairs() -> str:
    """Every writer of checkpoints with every reader."""
    lines = (
        [writer.name, *("–" if is_refused(writer, reader) else "=" for reader in READERS)]
        for writer in WRITERS
    )
    return table(("written by", *(reader.name for reader in READERS)), lines)


def rates(experiment: str) -> str:
    """Loss of an experiment's models at the training length, by learning rate."""
    rows = _read(f"rates_{experiment}")["rows"]
    rates = sorted({row["learning_rate"] for row in rows})
    found = {(row["positions"], row["learning_rate"]): row["bits_per_byte"] for row in rows}
    kinds = dict.fromkeys(row["positions"] for row in rows)
    lines = ([kind, *(f"{found[kind, rate]:.3f}" for rate in rates)] for kind in kinds)
    return table(("bits per byte at a learning rate of", *(f"{rate:g}" for rate in rates)), lines)


def extrapolation(windows: str) -> str:
    """Loss of every kind of positions and training length L, read at L to 16 L."""
    curves = [curve for curve in _extrapolation()["curves"] if curve["windows"] == windows]
    lines = []
    for curve in curves:
        spread = curve["spread"].values()
        cells = [
            f"{mean:.3f} ± {each:.3f}"
            for mean, each in zip(curve["mean"].values(), spread, strict=True)
        ]
        cells += ["–"] * (5 - len(cells))
        lines.append([curve["positions"], str(curve["training_length"]), *cells])
    return table(("bits per byte", "L", "read at L", "2 L", "4 L", "8 L", "16 L"), lines)


def growth() -> str:
    """By how much the loss grows from L to 16 L: the mean, and the range of all seeds."""
    curves = _extrapolation()["curves"]
    lengths = list(dict.fromkeys(curve["training_length"] for curve in curves))
    found: dict[tuple[str, str], dict[int, str]] = {}
    for curve in curves:
        by_length = list(curve["bits_per_byte"].values())
        if len(by_length) > 1:
            grown = [last - first for first, last in zip(by_length[0], by_length[-1], strict=True)]
            mean = sum(grown) / len(grown)
            cell = f"{mean:+.3f} ({min(grown):+.3f} … {max(grown):+.3f})"
            key = (curve["positions"], curve["windows"])
            found.setdefault(key, {})[curve["training_length"]] = cell
    lines = ([*key, *(cells[length] for length in lengths)] for key, cells in found.items())
    header = ("bits per byte at 16 L, less those at L", "windows")
    return table((*header, *(f"L = {length}" for length in lengths)), lines)


def experiment() -> str:
    """How the experiment was run."""
    results = _extrapolation()
    facts = results["experiment"]
    names = ("steps", "step_bytes", "layers", "width", "heads", "seeds", "excerpts")
    options = ", ".join(f"{name} {facts[name]}" for name in names)
    rates = ", ".join(f"{name} {rate:g}" for name, rate in facts["learning_rates"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"[results.json](extrapolation/results.json): {results['date']}, {results['machine']}, "
        f"{results['cpu_minutes']:.0f} minutes of one core; {versions}; "
        f"{facts['text']}; {options}; learning rates: {rates}.\n"
    )


def tpu_meshes() -> str:
    """What compiled steps of large models need of each chip of a mesh."""

    def line(row: dict[str, Any]) -> list[str]:
        mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items())
        kinds = dict(row["collectives"])
        nbytes = kinds.pop("bytes")
        arguments, temporary = (row[f"{kind}_bytes"] / 1e9 for kind in ("argument", "temporary"))
        return [
            *(f"{row['model']}, {row['part']}", f"{row['topology']}: {mesh}"),
            f"{arguments:.1f} + {temporary:.1f} of {row['gigabytes']} GB",
            *(str(row["kernels"]), ", ".join(f"{count} {kind}" for kind, count in kinds.items())),
            f"{nbytes / 1e6:,.0f} MB",
        ]

    header = ("model", "mesh", "arguments + temporaries", "Pallas kernels", "collectives", "of")
    lines = map(line, _read("tpu_meshes")["rows"])
    return f"{table(header, lines)}\n{origin('tpu_meshes')}"


def compile_times() -> str:
    """How long a step of training is traced and compiled, by the number of layers."""
    found = {(row["layers"], row["scanned"]): row for row in _read("compile_time")["rows"]}
    layers = list(dict.fromkeys(number for number, _ in found))

    def cell(number: int, scanned: bool) -> str:
        row = found[number, scanned]
        return f"{row['tracing']:.1f} + {row['compiling']:.1f}"

    lines = [
        [name, *(cell(number, scanned) for number in layers)]
        for name, scanned in (("every layer", False), ("one layer, scanned", True))
    ]
    header = ("tracing + compiling, s", *(f"{number} layers" for number in layers))
    return f"{table(header, lines)}\n{origin('compile_time')}"


def devices() -> str:
    """What the tests found on each device that a report is there of, by subject."""
    lines = []
    for file in sorted((RESULTS / "devices").glob("*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        where = ", ".join(
            f"{name}: {', '.join(kinds)}" for name, kinds in report["devices"].items()
        )
        subjects: dict[str, list[dict[str, Any]]] = {}
        for test in report["tests"]:
            name = test["test"].partition("::")[2]
            level = re.search(r"test_the_kit\[(\w+)-", name)
            subject = name.partition("[")[0] if level is None else f"kit, {level[1]}"
            subjects.setdefault(subject, []).append(test)
        for subject, tests in subjects.items():
            counts = [
                str(sum(test["outcome"] == outcome for test in tests))
                for outcome in ("passed", "failed", "skipped")
            ]
            worst = max((test["error"] for test in tests if test.get("error")), default=None)
            error = "" if worst is None else f"{worst:.1e}"
            lines.append([where, report["date"][:10], subject, *counts, error])
    header = ("device", "date", "subject", "passed", "failed", "skipped", "largest relative error")
    return table(header, lines)


def precision() -> str:
    """The errors of float32 models on emulated devices."""
    results = _read("precision")
    found = {(row["device"], row["model"]): row for row in results["rows"]}
    models = list(dict.fromkeys(model for _, model in found))
    lines = []
    for device, (default, highest) in results["devices"].items():
        rows = [found[device, model] for model in models]
        cells = (f"{row['forward']:.1e}, {row['gradient']:.1e}" for row in rows)
        lines.append([device, default, highest, *cells])
    header = ("tensors, gradients", "products", "in attention", *models)
    return f"{table(header, lines)}\n{results['length']:,} tokens. {origin('precision')}"


def llama_cpp() -> str:
    """How far llama.cpp's numbers are from ours, by model and dtype."""
    results = _read("llama_cpp")
    dtypes = ("float32", "float16", "bfloat16")
    lines = [[row["model"], *(f"{row[dtype]:.1e}" for dtype in dtypes)] for row in results["rows"]]
    return f"{table(('', *dtypes), lines)}\n{origin('llama_cpp')}"


def sharded_loading() -> str:
    """Opening a checkpoint on several devices: time, and memory beyond theirs."""
    results = _read("sharded_loading")
    lines = [
        [row["way"], f"{row['seconds']:.1f}", f"{row['extra_bytes'] / 1e6:,.0f}"]
        for row in results["rows"]
    ]
    size, largest = results["nbytes"] / 1e9, results["largest_tensor_bytes"] / 1e6
    facts = f"{size:.1f} GB, largest tensor {largest:,.0f} MB. {origin('sharded_loading')}"
    return f"{table(('', 's', 'MB beyond what the devices hold'), lines)}\n{facts}"


FIGURES: dict[str, Callable[..., str]] = {
    "attention": attention,
    "compile_times": compile_times,
    "conversion": conversion,
    "demo": demo,
    "devices": devices,
    "experiment": experiment,
    "extrapolation": extrapolation,
    "goals": goals,
    "growth": growth,
    "inference": inference,
    "llama_cpp": llama_cpp,
    "measured": measured,
    "mutants": mutants,
    "origin": origin,
    "other_inputs": other_inputs,
    "pairs": pairs,
    "precision": precision,
    "products": products,
    "rates": rates,
    "sharded_loading": sharded_loading,
    "tpu_meshes": tpu_meshes,
    "trainers": trainers,
    "training": training,
}


def rendered(text: str) -> str:
    """A document with its figures as the files of results have them."""

    def replaced(found: re.Match[str]) -> str:
        begin, words, end = found.groups()
        name, *arguments = words.split()
        return begin + FIGURES[name](*arguments) + end

    return BLOCK.sub(replaced, text)


def main() -> None:
    """Rewrite every document."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))


def _extrapolation() -> dict[str, Any]:
    path = ROOT / "docs" / "extrapolation" / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _number(value: float | None, factor: float) -> str:
    return "" if value is None else f"{value * factor:,.0f}"


def _figure(found: float | None) -> str:
    return "" if found is None else f"{found:.2f}"


def _sign(row: dict[str, Any]) -> str:
    return row["wanted"].replace(">=", "≥").replace("<=", "≤")


def _verdict(row: dict[str, Any]) -> str:
    return {True: "", False: "not reached", None: "not measured"}[row.get("met")]


if __name__ == "__main__":
    main()
