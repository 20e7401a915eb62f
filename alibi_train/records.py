"""What a run tells of itself: a line of JSON for each logged step, and a picture of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from alibi_convert.machine import require

LOG_FILE = "log.jsonl"
PICTURE = "loss.png"
_TENSORBOARD = "tensorboard"


class Records:
    """The log of a run.

    Args:
        folder: of the run.
        step: from which the run goes on: later lines, of a run that was killed, are removed.
        tensorboard: write TensorBoard's files too.

    Raises:
        ValueError: TensorBoard's library is not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.file = folder / LOG_FILE
        known = [line for line in read_log(folder) if line["step"] <= step]
        lines = [json.dumps(line) + "\n" for line in known]
        draft = self.file.with_name(f"{LOG_FILE}.new")  # a kill leaves one or the other
        draft.write_text("".join(lines), encoding="utf-8")
        draft.replace(self.file)
        self._board: Any = None
        if tensorboard:
            require("tensorboardX", "train", "writing TensorBoard's files")
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / _TENSORBOARD), purge_step=step + 1)

    def add(self, step: int, **values: float) -> None:
        """One line: the step, and numbers by name."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    @contextmanager
    def open(self) -> Iterator[Records]:
        """Close TensorBoard's file at the end."""
        with ExitStack() as stack:
            if self._board is not None:
                stack.callback(self._board.close)
            yield self


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that are whole."""
    file = folder / LOG_FILE
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # a killed run can leave a part behind


def plot_log(folder: Path) -> Path:
    """Draw the losses of a run's log.

    Raises:
        ValueError: matplotlib is not installed.
    """
    require("matplotlib", "train", "drawing the loss")
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 4))).add_subplot()
    log = read_log(folder)
    for name, style in (("loss", "-"), ("validation_loss", "o-")):
        points = [(line["step"], line[name]) for line in log if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    figure.savefig(folder / PICTURE, bbox_inches="tight")
    return folder / PICTURE
