"""Learning-rate schedules as a pure function of the step."""

import math


def rate(step: int, num_steps: int, schedule: str, warmup: float) -> float:
    """Multiplier of the peak learning rate at `step` (from 0): constant, linear or cosine to 0."""
    num_warmup = round(num_steps * warmup)
    if step < num_warmup:
        return (step + 1) / num_warmup
    if schedule == "constant":
        return 1.0
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
