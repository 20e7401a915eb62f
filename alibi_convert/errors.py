"""What goes wrong with checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written as asked; the message says why and how to fix it."""


class MismatchError(CheckpointError):
    """Two checkpoints that should be one model differ; the message names the first difference."""
