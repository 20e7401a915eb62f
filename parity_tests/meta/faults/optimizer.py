"""Plausible mistakes in carrying the state of optimizers."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

_TESTS = "test_optimizer_state.py -k"
_FILES = "test_optimizer_files.py -k"

_SLOPES = """\
        if config.slopes == "learned":
            yield row(f"{layer}.attn", "slopes", "heads -> heads", "slopes")
"""
_LINEAR = """\
        for name, heads in (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads")):
            pattern = f"({heads} head_dim) embed -> embed {heads} head_dim"
            yield from linear(f"{layer}.attn.{name}", pattern, config.attention_bias)
"""

FAULTS = (
    Mutant(
        "the moments of Adam exchanged",
        "alibi_convert/optimizers/optax_tree.py",
        '"mu": "exp_avg", "nu": "exp_avg_sq"}',
        '"nu": "exp_avg", "mu": "exp_avg_sq"}',
        f"{_TESTS} each_moment",
    ),
    Mutant(
        "moments of square shape left in torch's layout",
        "alibi_convert/optimizers/optax_state.py",
        "jax.numpy.asarray(to_flax_layout(row, moment))",
        "jax.numpy.asarray(moment.reshape(row.flax_shape))",
        f"{_TESTS} 'each_moment or next_update'",
    ),
    Mutant(
        "moments that come back keep the layout of Flax",
        "alibi_convert/optimizers/optax_state.py",
        "torch_view(row, leaf)",
        "LazyTensor(row.shape, leaf.dtype, lambda leaf=leaf, row=row: "
        "np.asarray(leaf).reshape(row.shape))",
        f"{_TESTS} from_torch_and_back",
    ),
    Mutant(
        "counts that are off by one",
        "alibi_convert/optimizers/optax_state.py",
        "return jnp.asarray(step or 0, field.value.dtype)",
        "return jnp.asarray((step or 0) + 1, field.value.dtype)",
        f"{_TESTS} 'from_optax_and_back or next_update'",
    ),
    Mutant(
        "schedules that start again",
        "alibi_convert/optimizers/optax_tree.py",
        '"ScaleByScheduleState": {"count": COUNT}',
        '"ScaleByScheduleState": {"count": RECORD}',
        f"{_TESTS} from_optax_and_back",
    ),
    Mutant(
        "injected schedules that start again",
        "alibi_convert/optimizers/optax_tree.py",
        '"hyperparams_states": INNER',
        '"hyperparams_states": RECORD',
        f"{_TESTS} from_optax_and_back",
    ),
    Mutant(
        "parameters numbered in the order of the forward pass, not torch's",
        "alibi_spec/parameters.py",
        f"{_SLOPES}{_LINEAR}",
        f"{_LINEAR}{_SLOPES}",
        f"{_TESTS} order_is_that",
    ),
    Mutant(
        "one counter for all parameters, to which torch adds in place",
        "alibi_convert/optimizers/torch_state.py",
        'entry["step"] = _counter(state.step)',
        'entry["step"] = state.__dict__.setdefault("counter", _counter(state.step))',
        f"{_TESTS} optimizer_loads_it",
    ),
    Mutant(
        "the rate of like= before the one that was injected",
        "alibi_convert/optimizers/torch_state.py",
        "merged = [dict(group) | state.options(numbered.parameters(group)) for group in groups]",
        "merged = [state.options(numbered.parameters(group)) | dict(group) for group in groups]",
        f"{_TESTS} come_first",
    ),
    Mutant(
        "groups that share a shape told apart all the same",
        "alibi_convert/optimizers/torch_state.py",
        "if owners.setdefault(shapes.get(number, ()), index) != index or number not in shapes:",
        "if owners.setdefault(shapes.get(number, ()), index) is None or number not in shapes:",
        f"{_TESTS} shapes_do_not_tell",
    ),
    Mutant(
        "zeros for a parameter that Adam never updated",
        "alibi_convert/optimizers/optax_state.py",
        "if state.names and missing and KINDS[state.kind].has_step:",
        "if state.names and missing and not state.kind:",
        f"{_TESTS} never_stepped",
    ),
    Mutant(
        "the largest of unequal steps for all",
        "alibi_convert/optimizers/torch_state.py",
        "if len(set(steps.values())) > 1:",
        "if len(set(steps.values())) > len(steps):",
        f"{_TESTS} torch_states_that_are_refused",
    ),
    Mutant(
        "RAdam and Muon taken for Adam and SGD",
        "alibi_convert/optimizers/state.py",
        'frozenset(("betas", "eps", "amsgrad"))',
        'frozenset(("betas", "eps"))',
        f"{_TESTS} other_optimizers",
    ),
    Mutant(
        "gradients that are half accumulated dropped",
        "alibi_convert/optimizers/optax_tree.py",
        '"acc_grads": START',
        '"acc_grads": RECORD',
        f"{_TESTS} at_times",
    ),
    Mutant(
        "moments cast in silence to what the transformation keeps",
        "alibi_convert/optimizers/optax_state.py",
        "if dtype != zeros.dtype:",
        "if False:",
        f"{_TESTS} two_dtypes",
    ),
    Mutant(
        "hyperparameters that are those of the transformation again",
        "alibi_convert/optimizers/optax_state.py",
        "if options.get(word) is None:",
        "if options.get(word) is None or place is None:",
        f"{_TESTS} from_optax_and_back",
    ),
    Mutant(
        "an optimizer's state dropped in silence",
        "alibi_convert/carrying.py",
        "return Carried({**source.derived, beside.name: reason})",
        "return Carried(others)",
        f"{_FILES} cannot_be_carried",
    ),
    Mutant(
        "the optimizer's file not read back",
        "alibi_convert/conversion.py",
        "require_same_optimizer(optimizer.state, optimizer_of(found))",
        "require_same_optimizer(optimizer.state, optimizer.state)",
        f"{_FILES} wrong_write",
    ),
    Mutant(
        "the state of an optimizer stays beside other weights",
        "alibi_convert/writing/layout.py",
        "WEIGHTS_FILE, INDEX_FILE, OPTIMIZER_FILE, TRAINING_FILE)",
        "WEIGHTS_FILE, INDEX_FILE, TRAINING_FILE)",
        f"{_FILES} beside_a_model",
    ),
    Mutant(
        "the first of two optimizers taken",
        "alibi_convert/formats/pt.py",
        "if len(self.optimizers) != 1:",
        "if not self.optimizers:",
        f"{_FILES} cannot_be_carried",
    ),
    Mutant(
        "saved states without their schedules",
        "alibi_convert/optimizers/saved.py",
        "return [recognised(child) for child in node]",
        "return [recognised(child) for child in node[:1]]",
        f"{_FILES} 'flax_training_states and orbax'",
    ),
    Mutant(
        "numbers in a saved state believed",
        "alibi_convert/optimizers/state.py",
        "    if array.ndim or not (",
        "    if array.ndim and not (",
        f"{_FILES} 'no_states or traceback'",
    ),
    Mutant(
        "a saved state that begins to count again",
        "alibi_convert/optimizers/saved.py",
        '{"step": state.step or 0,',
        '{"step": 0,',
        f"{_FILES} plain_training_states",
    ),
    Mutant(
        "a saved state of SGD without its momentum",
        "alibi_convert/optimizers/saved.py",
        "momentum=0.9 if keeps else None",
        "momentum=None",
        f"{_FILES} plain_training_states",
    ),
    Mutant(
        "the transformation that is given forgotten",
        "alibi_convert/optimizers/saved.py",
        "plain_tx(state) if tx is None else tx",
        "plain_tx(state)",
        f"{_FILES} 'flax_training_states or no_use'",
    ),
    Mutant(
        "torch's options held against those that optax lacks",
        "alibi_convert/carrying.py",
        "    if to not in _REREAD:\n        return state\n",
        "    if to in _REREAD:\n        return state\n",
        f"{_FILES} flax_training_states",
    ),
    Mutant(
        "rates that are lost not reported",
        "alibi_convert/carrying.py",
        "others | _lost(lost, beside.name), expected",
        "others, expected",
        f"{_FILES} plain_training_states",
    ),
    Mutant(
        "a transformation that has no use passed over",
        "alibi_convert/carrying.py",
        "if tx is not None and found.state is None:",
        "if tx is not None and not found:",
        f"{_FILES} no_use",
    ),
)
