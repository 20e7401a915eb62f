"""How far llama.cpp's numbers are from ours, from the files that we write.

`python -m benchmarks.llama_cpp`, with the packages of `make test-clients`: log-probabilities of the
next token, and vectors of encoders, after drawn prompts of up to 200 tokens, against ours in
float64; the largest error of any. Those tests hold them to limits.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import alibi_torch
from alibi_convert import convert
from alibi_spec.budgets import relative_error
from benchmarks.compare import write
from parity_tests.checkpoints import write as write_model
from parity_tests.clients.test_llama_cpp import (
    CASES,
    LENGTHS,
    log_probabilities,
    our_log_probabilities,
    running,
)
from parity_tests.gguf_files import ASCII, ENCODERS, VOCAB, folder

RESULTS = Path(__file__).parent / "results" / "llama_cpp.json"
DTYPES = ("float32", "float16", "bfloat16")


def of_decoder(name: str, dtype: str, place: Path) -> float:
    """The largest error of log-probabilities after prompts of every length."""
    file = place / "model.gguf"
    convert(folder(place / "model", CASES[name], ASCII), file, dtype=dtype, verify="bits")
    tokens = np.random.default_rng(0).integers(0, VOCAB, max(LENGTHS))
    exact = our_log_probabilities(file, tokens)
    with running(file) as server:
        return max(
            relative_error(log_probabilities(server, tokens[:length]), exact[length - 1])
            for length in LENGTHS
        )


def of_encoder(name: str, dtype: str, place: Path) -> float:
    """The largest error of mean vectors of every length."""
    file = place / "model.gguf"
    convert(write_model(place / "model", config=ENCODERS[name]), file, dtype=dtype, verify="bits")
    model = alibi_torch.ALiBiLM.from_pretrained(file, dtype=torch.float64).eval()
    drawn = np.random.default_rng(0).integers(0, VOCAB, max(LENGTHS)).tolist()
    sequences = [drawn[:length] for length in LENGTHS]
    exact = alibi_torch.encode(model, sequences).numpy()
    with running(file, "LLAMA_POOLING_TYPE_UNSPECIFIED") as server:
        answers: Any = [server.handle_embeddings({"input": each})["data"] for each in sequences]
    return max(
        relative_error(np.array(found["embedding"]), wanted)
        for (found,), wanted in zip(answers, exact, strict=True)
    )


def main() -> None:
    """Measure every kind of model in every dtype and write the file of results."""
    rows = []
    for measured, names in ((of_decoder, CASES), (of_encoder, ENCODERS)):
        for name in names:
            row: dict[str, Any] = {"model": name}
            for dtype in DTYPES:
                with tempfile.TemporaryDirectory() as place:
                    row[dtype] = measured(name, dtype, Path(place))
            rows.append(row)
            print(row, flush=True)
    packages = ("alibi-duo", "xllamacpp", "gguf", "torch")
    versions = {package: version(package) for package in packages}
    write(RESULTS, {"versions": versions, "lengths": list(LENGTHS), "rows": rows})


if __name__ == "__main__":
    main()
