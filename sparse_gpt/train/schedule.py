"""The learning rate as a pure function of the step, so that nothing of it needs saving."""

import math

from sparse_gpt.config.schema import RunConfig, ScheduleConfig


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


def jump(step: int, before: RunConfig, now: RunConfig) -> str | None:
    """What to say of a run that goes on at `step` under another schedule's length, where its
    learning rate is by 1% or more another than it would have been; None else."""
    old, new = (
        learning_rate(step, run.total_steps, run.optimizer.lr, run.schedule)
        for run in (before, now)
    )
    if math.isclose(old, new, rel_tol=0.01):
        return None
    last = learning_rate(step - 1, before.total_steps, before.optimizer.lr, before.schedule)
    return (
        f"the schedule is of {now.total_steps} steps now, it was of {before.total_steps}: from "
        f"step {step} on the learning rate is {new:.3g}, it was {last:.3g}. To go on without a "
        "jump: a checkpoint from before the fall of schedule.kind: wsd, or a new run with "
        "start_from"
    )
