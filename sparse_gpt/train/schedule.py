"""The learning rate as a pure function of the step, so that nothing of it needs saving."""

import math

from sparse_gpt.config.schema import ScheduleConfig


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of the update that follows `step` completed ones.

    Linear warm-up by step; then `cosine` (Loshchilov & Hutter 2017) or `linear` down to
    `final_lr_ratio` x peak at the last step, or `wsd`: constant, with a 1 - sqrt cool-down over the
    last `decay_fraction` of the run (Hägele et al. 2024).
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    start = fall_start(total_steps, schedule)
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))
    if schedule.kind == "cosine":
        fall = (1 - math.cos(math.pi * progress)) / 2
    elif schedule.kind == "wsd":
        fall = math.sqrt(progress)
    else:
        fall = progress
    return peak * (1 - (1 - schedule.final_lr_ratio) * fall)


def fall_start(total_steps: int, schedule: ScheduleConfig) -> int:
    """Completed steps up to which the learning rate does not depend on the run's length."""
    steady = int(total_steps * (1 - schedule.decay_fraction)) if schedule.kind == "wsd" else 0
    return max(0, min(max(schedule.warmup_steps, steady), total_steps - 2))  # the last is lowest
