"""How the demo trains its models: all of them alike, in PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import alibi_torch
from alibi_cli.demo.positions import ALIBI, ROTARY, SINUSOIDAL, torch_logits, torch_model
from alibi_spec import ALiBiConfig

# The best of 3e-3, 6e-3, 1.2e-2 and 2.4e-2 for each, by the loss at the training length.
LEARNING_RATES = {ALIBI: 6e-3, ROTARY: 6e-3, SINUSOIDAL: 6e-3}
WARMUP = 0.1  # of all steps


@dataclass(frozen=True)
class Training:
    """What all models have in common.

    Attributes:
        config: of the ALiBi model; the others differ in their positions.
        text: bytes to learn from.
        steps: of the optimizer.
        batch: sequences of `max_len` bytes per step.
    """

    config: ALiBiConfig
    text: np.ndarray
    steps: int
    batch: int


def train(training: Training, positions: str, seed: int) -> alibi_torch.ALiBiLM:
    """A model trained on random windows of the text: AdamW, warm-up, cosine decay.

    A seed draws the same windows, in the same order, for every kind of positions.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = torch_model(training.config, positions).train()
    rate, length = LEARNING_RATES[positions], training.config.max_len
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _decayed(step, training.steps)
    )
    progress = tqdm(range(training.steps), f"{positions}, seed {seed}", unit="step", mininterval=1)
    for _ in progress:
        starts = rng.integers(0, len(training.text) - length, training.batch)
        windows = np.stack([training.text[start : start + length + 1] for start in starts])
        tokens = torch.from_numpy(windows)
        logits = torch_logits(model, tokens[:, :-1], positions)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(bits_per_byte=f"{loss.item() / math.log(2):.2f}", refresh=False)
    return model.eval()


def _decayed(step: int, steps: int) -> float:
    """Share of the learning rate at a step."""
    warmup = max(1, int(steps * WARMUP))
    progress = max(0.0, (step - warmup) / max(1, steps - warmup))
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))
