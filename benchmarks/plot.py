"""Time against length, all peers in one picture: `python -m benchmarks.plot RESULTS.json …`.

A picture is written beside each file of results that has rows of peers and lengths.
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


def picture(results: dict[str, Any], path: Path) -> None:
    """One panel per pass: float32 with normal inputs, milliseconds, log-log."""
    rows = [
        row
        for row in results["rows"]
        if "seconds" in row and (row["dtype"], row["inputs"]) == ("float32", "normal")
    ]
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    colours = plt.get_cmap("tab10")
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axes, pass_name in zip(panels, PASSES, strict=True):
        for index, peer in enumerate(peers):
            mine = [row for row in rows if (row["peer"], row["pass"]) == (peer, pass_name)]
            is_ours = peer.startswith("alibi")
            axes.plot(
                [row["seq"] for row in mine],
                [row["seconds"] * 1e3 for row in mine],
                marker="o" if is_ours else ".",
                linewidth=2.4 if is_ours else 1.2,
                linestyle="-" if is_ours else "--",
                color=colours(index % 10),
                label=peer,
            )
        axes.set(xscale="log", yscale="log", xlabel="sequence length", title=pass_name)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(frameon=False, fontsize="small")
    machine, shape = results["machine"], results["shape"]
    figure.suptitle(
        f"float32, batch {shape['batch']}, {shape['heads']} heads of {shape['head_dim']}; "
        f"{machine['cpu'].strip()}, {machine['cores']} cores, {results['date'][:10]}"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
