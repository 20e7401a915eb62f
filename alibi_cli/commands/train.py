"""`alibi train`: a run of training, in either backend, from one TOML file."""

from __future__ import annotations

import argparse
from typing import Any

from alibi_cli.arguments import add_backend_option, add_mesh_options, count, path
from alibi_cli.exit_codes import OK
from alibi_cli.rendering import print_json

HELP = "train a model on text, or go on with a run, in either backend"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings, and where the run is kept."""
    parser.add_argument("settings", type=path, help="TOML: [model], [data], [training], [run]")
    parser.add_argument(
        "--output",
        type=path,
        required=True,
        metavar="FOLDER",
        help="of checkpoints and log; a run that is there goes on",
    )
    add_backend_option(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.OPTION=VALUE",
        help="an option in place of the file's, as TOML has it; may be repeated",
    )
    parser.add_argument(
        "--until", type=count, metavar="STEP", help="stop after this step, and save"
    )
    parser.add_argument(
        "--train-tokenizer",
        type=count,
        metavar="SIZE",
        help="train a byte-level BPE tokenizer of so many tokens on data.train first",
    )
    parser.add_argument("--device", help="of PyTorch (default: a GPU where there is one)")
    add_mesh_options(parser)
    parser.add_argument(
        "--processes",
        metavar="GROUP",
        help="of JAX, one on each host: auto, where Slurm, Open MPI, Kubernetes or Cloud TPU "
        "started them; or ADDRESS:PORT,COUNT,NUMBER: where the first listens, how many, and "
        "which one this is, from 0",
    )
    parser.add_argument("--no-plot", action="store_true", help="draw no picture of the loss")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Train, and say where the model is.

    Raises:
        ValueError: settings or data that do not fit, or a loss that is not finite.
        CheckpointError: a checkpoint that is broken or cannot be written.
    """
    if options.processes is not None and (options.mesh is None or options.backend != "flax"):
        raise ValueError("--processes are those of --backend flax with a --mesh; pass both")
    if options.mesh is None:
        return _run(options, None)
    from alibi_train.processes import processes

    if options.device or options.train_tokenizer:
        raise ValueError(
            "--mesh is of all devices, with a tokenizer that is there; leave out --device and "
            "--train-tokenizer"
        )
    with processes(options.mesh, options.backend, options.processes) as mesh:
        return _run(options, mesh)


def _run(options: argparse.Namespace, mesh: Any) -> int:
    from alibi_convert.machine import require
    from alibi_train import read_settings, train
    from alibi_train.processes import is_first
    from alibi_train.records import plot_log

    settings = read_settings(options.settings, options.set)
    if not options.no_plot:
        require("matplotlib", "train", "drawing the loss (or pass --no-plot)")
    if settings.run.dtype == "float64" and options.backend == "flax":
        import jax

        jax.config.update("jax_enable_x64", True)
    if options.train_tokenizer is not None:
        from alibi_train.vocabulary import train_tokenizer

        train_tokenizer(settings, options.output, options.train_tokenizer)
    finished = train(
        settings,
        options.output,
        options.backend,
        until=options.until,
        device=options.device,
        progress=not options.json,
        mesh=mesh,
    )
    if not is_first(mesh):
        return OK
    picture = None if options.no_plot else plot_log(options.output)
    if options.json:
        print_json(
            {
                "folder": str(finished.folder),
                "step": finished.step,
                "loss": finished.loss,
                "validation_loss": finished.validation_loss,
                "picture": None if picture is None else str(picture),
            }
        )
        return OK
    losses = {"loss": finished.loss, "validation loss": finished.validation_loss}
    told = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if value is not None)
    print(f"{finished.folder}: step {finished.step}{', ' if told else ''}{told}")
    return OK
