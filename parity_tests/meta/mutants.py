"""Plant faults one by one in a copy of the code and see the tests catch each: `make mutants`.

A row is one plausible mistake: where, what stands there, what is put instead, and the tests that
must then fail and that pass without it. A fault that survives, or whose text is gone, is a failure.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("alibi_spec", "alibi_convert", "alibi_torch", "alibi_flax", "alibi_cli", "parity_tests")


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    fault: str
    file: str
    before: str
    after: str
    tests: str


MUTANTS = (
    Mutant(
        "bias in bfloat16",
        "alibi_flax/kernels/dense.py",
        "_bias(slopes.astype(dtype), query_len, key_len, distance)[None]",
        "_bias(slopes.astype(jnp.bfloat16), query_len, key_len, distance)[None].astype(dtype)",
        "test_logits.py",
    ),
    Mutant(
        "distance off by one for cached queries",
        "alibi_torch/kernels/dense.py",
        "torch.arange(key_len - query_len, key_len, device=device)",
        "torch.arange(query_len, device=device)",
        "test_attention.py",
    ),
    Mutant(
        "signed distance for every encoder",
        "alibi_flax/kernels/dense.py",
        'if distance == "absolute":',
        'if distance == "never":',
        "test_logits.py",
    ),
    Mutant(
        "scale by d_model instead of head_dim",
        "alibi_torch/kernels/dense.py",
        "1 / math.sqrt(head_dim) if scale is None",
        "1 / math.sqrt(query.shape[1] * head_dim) if scale is None",
        "test_attention.py",
    ),
    Mutant(
        "one bit of one slope",
        "alibi_flax/model.py",
        "slopes = jnp.asarray(model_slopes(self.config))",
        "slopes = jnp.asarray(model_slopes(self.config)) * (1 + 2**-20)",
        "test_outputs.py -k float64",
    ),
    Mutant(
        "slopes rounded with the model",
        "alibi_torch/model.py",
        "self.slopes = torch.tensor(slopes, dtype=torch.float32, device=device)",
        "pass",
        "test_ecosystems.py -k slopes",
    ),
    Mutant(
        "paper slopes wrong beyond powers of two",
        "alibi_spec/bias.py",
        "range(1, 2 * (num_heads - power), 2)",
        "range(1, num_heads - power + 1)",
        "test_config.py",
    ),
    Mutant(
        "strict causal mask",
        "alibi_flax/kernels/dense.py",
        "_relative_position(query_len, key_len) <= 0",
        "_relative_position(query_len, key_len) < 0",
        "test_logits.py",
    ),
    Mutant(
        "padding mask ignored",
        "alibi_torch/kernels/dense.py",
        "visible & attention_mask.to(torch.bool)[:, None, None, :]",
        "visible",
        "test_logits.py",
    ),
    Mutant(
        "segments ignored",
        "alibi_flax/kernels/dense.py",
        "query_segment[:, None, :, None] == segment_ids[:, None, None, :]",
        "query_segment[:, None, :, None] == query_segment[:, None, :, None]",
        "test_attention.py",
    ),
    Mutant(
        "empty rows attend to everything",
        "alibi_torch/kernels/dense.py",
        "attended.masked_fill(no_key, 0.0)",
        "attended",
        "test_attention.py",
    ),
    Mutant(
        "empty rows are NaN",
        "alibi_flax/kernels/dense.py",
        "jnp.where(visible | no_key, logits, -math.inf)",
        "jnp.where(visible, logits, -math.inf)",
        "test_attention.py -k empty",
    ),
    Mutant(
        "tanh GELU",
        "alibi_flax/model.py",
        "approximate=False",
        "approximate=True",
        "test_outputs.py -k float64",
    ),
    Mutant(
        "linen's default epsilon",
        "alibi_flax/model.py",
        "epsilon=config.norm_eps, ",
        "",
        "test_outputs.py -k float64",
    ),
    Mutant(
        "fast variance",
        "alibi_flax/model.py",
        "use_fast_variance=False",
        "use_fast_variance=True",
        "test_outputs.py -k narrow",
    ),
    Mutant(
        "final norm forgotten",
        "alibi_torch/model.py",
        "return self.final_norm(x) if self.config.final_norm else x",
        "return x",
        "test_outputs.py -k float64",
    ),
    Mutant(
        "tied head not tied",
        "alibi_flax/model.py",
        "return self.token_embedding.attend(x)",
        "return self.token_embedding.attend(x) * 1.0001",
        "test_outputs.py -k narrow",
    ),
    Mutant(
        "gradient stopped through the norm",
        "alibi_torch/model.py",
        "self.attn(self.attn_norm(x), slopes, attention_mask)",
        "self.attn(self.attn_norm(x.detach()), slopes, attention_mask)",
        "test_gradients.py -k float64",
    ),
    Mutant(
        "logits in the dtype of the inputs",
        "alibi_torch/kernels/dense.py",
        "dtype = torch.float64 if query.dtype == torch.float64 else torch.float32",
        "dtype = query.dtype",
        "test_outputs.py -k narrow",
    ),
    Mutant(
        "heads and head_dim exchanged",
        "alibi_spec/parameters.py",
        '"(heads head_dim) embed -> embed heads head_dim"',
        '"(head_dim heads) embed -> embed heads head_dim"',
        "test_parameters.py -k tracer",
    ),
    Mutant(
        "square matrices not transposed",
        "alibi_spec/parameters.py",
        '"weight", "mlp embed -> embed mlp"',
        '"weight", "embed mlp -> embed mlp"',
        "test_parameters.py -k tracer",
    ),
    Mutant(
        "query, key, value instead of key, query, value",
        "alibi_convert/families/jaketae.py",
        '("key", "query", "value")',
        '("query", "key", "value")',
        "test_seed.py",
    ),
    Mutant(
        "seed scale by head_dim",
        "alibi_spec/config.py",
        "1 / math.sqrt(d_model)",
        "1 / math.sqrt(d_model / 4)",
        "test_seed.py",
    ),
    Mutant(
        "strided arrays written as they are",
        "alibi_convert/store.py",
        "np.ascontiguousarray(tensors[name])",
        "tensors[name]",
        "test_convert.py -k strided",
    ),
    Mutant(
        "the old destination goes first",
        "alibi_convert/store.py",
        "            yield temporary\n",
        "            import shutil\n\n            shutil.rmtree(destination, ignore_errors=True)\n"
        "            yield temporary\n",
        "test_damage.py -k nothing_stays",
    ),
    Mutant(
        "pickles without weights_only",
        "alibi_convert/formats.py",
        "weights_only=True",
        "weights_only=False",
        "test_damage.py -k pickles",
    ),
    Mutant(
        "verification that never reads back",
        "alibi_convert/convert.py",
        "require_same(checkpoint, replace(written, path=destination))",
        "require_same(checkpoint, checkpoint)",
        "test_damage.py -k wrong_write",
    ),
    Mutant(
        "verify runs the same checkpoint twice",
        "alibi_convert/verify.py",
        "((TorchBackend(), ours), (FlaxBackend(), theirs)):\n        found = backend.trace",
        "((TorchBackend(), ours), (FlaxBackend(), ours)):\n        found = backend.trace",
        "test_convert.py -k sees_a_model",
    ),
    Mutant(
        "dropout always on",
        "alibi_flax/model.py",
        "dropout = 0.0 if deterministic else self.config.probability_dropout",
        "dropout = self.config.probability_dropout",
        "test_ecosystems.py -k flax",
    ),
    Mutant(
        "one backend imports the other",
        "alibi_torch/kernels/dense.py",
        "import torch\n",
        "import jax  # noqa\nimport torch\n",
        "test_surface.py -k walls",
    ),
    Mutant(
        "a signature drifts",
        "alibi_flax/attention.py",
        'distance: str = "absolute",\n    dropout',
        'distance: str = "signed",\n    dropout',
        "test_surface.py -k signatures",
    ),
    Mutant(
        "greedy generation reads the wrong position",
        "alibi_flax/generate.py",
        "logits[:, position - 1]",
        "logits[:, position - 2]",
        "test_models.py -k greedy",
    ),
    Mutant(
        "a comparison that compares nothing",
        "parity_tests/compare.py",
        "    if not error <= relative:",
        "    if error > 1e9 * relative:",
        "meta",
    ),
)

TESTS_FAILED = 1  # pytest's exit code; a mutant that does not even import proves nothing


def run_tests(tests: str, mutant: Mutant | None = None) -> subprocess.CompletedProcess[str]:
    """Run some tests in a copy of the code, with or without a fault in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copy / package)
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant is not None:
            file = copy / mutant.file
            code = file.read_text(encoding="utf-8")
            file.write_text(code.replace(mutant.before, mutant.after), encoding="utf-8")
        path, *options = shlex.split(tests)
        command = [sys.executable, "-m", "pytest", "-x", "-q", f"parity_tests/{path}", *options]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)


def healthy(tests: str) -> str | None:
    """None when these tests pass without any fault, else what happened instead."""
    done = run_tests(tests)
    return done.stdout[-2000:] if done.returncode else None


def survival(mutant: Mutant) -> str | None:
    """None when the tests caught the fault, else what happened instead."""
    if mutant.before not in (ROOT / mutant.file).read_text(encoding="utf-8"):
        return f"{mutant.file} no longer holds {mutant.before!r}"
    done = run_tests(mutant.tests, mutant)
    return None if done.returncode == TESTS_FAILED else f"{done.returncode}: {done.stdout[-2000:]}"


def main() -> int:
    """Try every mutant (or those whose fault holds the words given) and report the survivors."""
    words = " ".join(sys.argv[1:])
    chosen = [mutant for mutant in MUTANTS if words in mutant.fault]
    selections = sorted({mutant.tests for mutant in chosen})
    failures = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        for tests, trouble in zip(selections, pool.map(healthy, selections), strict=True):
            failures += trouble is not None
            print(f"{'passes  ' if trouble is None else 'FAILS   '}  {tests}, nothing planted")
            print(trouble or "", end="", flush=True)
        for mutant, trouble in zip(chosen, pool.map(survival, chosen), strict=True):
            failures += trouble is not None
            print(f"{'caught  ' if trouble is None else 'SURVIVED'}  {mutant.fault}")
            print(trouble or "", end="", flush=True)
    print(f"{len(chosen)} faults planted, {failures or 'no'} failures")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
