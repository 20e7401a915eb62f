"""Training runs in either backend: data, checkpoints, log; `alibi train` on the command line."""

from alibi_train.running import Finished, train
from alibi_train.settings import Settings, read_settings

__all__ = ["Finished", "Settings", "read_settings", "train"]
