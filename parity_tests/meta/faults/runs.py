"""In runs of training: the order of the data, what is saved, and how a run goes on."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

_DATA = "test_training_data.py -k"
_RUNS = "test_training_runs.py -k"

FAULTS = (
    Mutant(
        "the token behind a sequence is not predicted",
        "alibi_train/batches.py",
        "end = start + self.length + self.has_next",
        "end = start + self.length",
        f"{_DATA} predicted_once",
    ),
    Mutant(
        "documents begin one token late",
        "alibi_train/batches.py",
        'self.documents.ends, position, side="right")',
        'self.documents.ends, position, side="left")',
        f"{_DATA} predicted_once",
    ),
    Mutant(
        "every epoch has the same order",
        "alibi_train/batches.py",
        ".shuffle().repeat()",
        ".shuffle().repeat(reseed_each_epoch=False)",
        f"{_DATA} order",
    ),
    Mutant(
        "masks do not follow the number of the batch",
        "alibi_train/batches.py",
        "first_sequence=number * self.batch_size",
        "first_sequence=0",
        f"{_DATA} masked",
    ),
    Mutant(
        "a document ends before its end token",
        "alibi_train/documents.py",
        "== end_token_id) + start + 1)",
        "== end_token_id) + start)",
        f"{_DATA} every_kind",
    ),
    Mutant(
        "validation leaves out its last sequences",
        "alibi_train/batches.py",
        "enumerate(range(0, len(self.rows), self.batch_size))",
        "enumerate(range(0, len(self.rows) - self.batch_size, self.batch_size))",
        f"{_DATA} validation_reads",
    ),
    Mutant(
        "a run that goes on begins with the first batch",
        "alibi_train/running.py",
        'self.batches.set_state(start.progress["position"])',
        "pass",
        f"{_RUNS} same_bits",
    ),
    Mutant(
        "a run goes on without the moments",
        "alibi_train/running.py",
        "backend, start.config, settings.recipe, tensors, start.optimizer, device",
        "backend, start.config, settings.recipe, tensors, None, device",
        f"{_RUNS} same_bits",
    ),
    Mutant(
        "a checkpoint shares its memory with the weights",
        "alibi_train/backends.py",
        "np.array(as_numpy(tensors[name]))",
        "as_numpy(tensors[name])",
        f"{_RUNS} while_it_trains",
    ),
    Mutant(
        "a loss that is not finite is passed over",
        "alibi_train/running.py",
        "if not all(map(math.isfinite, values.values())):",
        "if False:",
        f"{_RUNS} not_finite",
    ),
    Mutant(
        "a run goes on with other settings",
        "alibi_train/running.py",
        "lines = list(differences(settings.identity, before))",
        "lines = []",
        f"{_RUNS} another_run",
    ),
    Mutant(
        "the best checkpoint is removed",
        "alibi_train/checkpoints.py",
        "kept.add(min(steps, key=self._validation_loss))",
        "pass",
        f"{_RUNS} checkpoints_stay",
    ),
    Mutant(
        "fresh weights depend on the backend's own generator",
        "alibi_spec/parameters.py",
        "drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(row.shape)",
        "drawn = np.random.default_rng().standard_normal(row.shape)",
        f"{_RUNS} same_model",
    ),
    Mutant(
        "lines of a killed run stay in the log",
        "alibi_train/records.py",
        'if line["step"] <= step]',
        "]",
        f"{_RUNS} same_bits",
    ),
    Mutant(
        "a token beyond 32 bits is cut to one of the vocabulary",
        "alibi_train/batches.py",
        "tokens = np.asarray(self.documents.tokens[start:end])",
        "tokens = np.asarray(self.documents.tokens[start:end]).astype(np.int32)",
        f"{_DATA} arrays_that",
    ),
    Mutant(
        "a text with other ends of lines is torn",
        "alibi_train/documents.py",
        '.removesuffix("\\n").split("\\n")',
        ".splitlines()",
        f"{_DATA} look_like_others",
    ),
    Mutant(
        "a name with brackets is taken for a pattern",
        "alibi_train/documents.py",
        "named = [path] if (folder / path).is_file() else []",
        "named = []",
        f"{_DATA} look_like_others",
    ),
    Mutant(
        "the speed counts the steps before a run went on",
        "alibi_train/running.py",
        "before, self.step = self.step, step",
        "before, self.step = 0, step",
        f"{_RUNS} speed_is",
    ),
    Mutant(
        "two runs train in one folder",
        "alibi_train/running.py",
        "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        f"{_RUNS} at_once",
    ),
)
