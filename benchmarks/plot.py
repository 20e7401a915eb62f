"""Time and memory against length, all peers in one picture: `python -m benchmarks.plot FILE …`.

A picture is written next to each file of results that has rows of peers and lengths.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PASSES = ("forward", "forward and backward")
_FIELDS = (("seconds", 1e3), ("extra_bytes", 1e-6))  # and the factor to the unit of its axis


def picture(results: dict[str, Any], path: Path) -> None:
    """A row of panels for time and one for memory, a column per pass: float32, normal inputs."""
    rows = [
        row
        for row in results["rows"]
        if "extra_bytes" in row and (row["dtype"], row["inputs"]) == ("float32", "normal")
    ]
    if not rows:
        raise SystemExit(f"{path.stem} has no rows with memory: a quick run measures none")
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure, panels = plt.subplots(
        2, 2, figsize=(12, 9), sharex=True, sharey="row", layout="constrained"
    )
    for column, pass_name in enumerate(PASSES):
        for index, peer in enumerate(peers):
            mine = [row for row in rows if (row["peer"], row["pass"]) == (peer, pass_name)]
            for line, (field, factor) in zip(panels, _FIELDS, strict=True):
                _draw(line[column], mine, field, factor, peer, index)
        panels[0][column].set_title(pass_name)
        panels[1][column].set_xlabel("sequence length")
    panels[0][0].set_ylabel("milliseconds")
    panels[1][0].set_ylabel("megabytes, without the inputs")
    panels[0][0].legend(frameon=False, fontsize="small")
    machine, shape = results["machine"], results["shape"]
    figure.suptitle(
        f"float32, batch {shape['batch']}, {shape['heads']} heads of {shape['head_dim']}; "
        f"{machine['cpu'].strip()}, {machine['cores']} cores, {results['date'][:10]}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(
    axes: Any, rows: list[dict[str, Any]], field: str, factor: float, peer: str, index: int
) -> None:
    is_ours = peer.startswith("alibi")
    axes.plot(
        [row["seq"] for row in rows],
        [row[field] * factor for row in rows],
        marker="o" if is_ours else ".",
        linewidth=2.4 if is_ours else 1.2,
        linestyle="-" if is_ours else "--",
        color=plt.get_cmap("tab10")(index % 10),
        label=peer,
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> int:
    """Draw every file that is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    for file in parser.parse_args().results:
        picture(json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".png"))
        print(file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
