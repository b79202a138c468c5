from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.config.schema import ScheduleConfig
from sparse_gpt.train.schedule import learning_rate

schedules = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["cosine", "wsd", "linear"]),
    warmup_steps=st.integers(0, 20),
    decay_fraction=st.floats(0.01, 1),
    final_lr_ratio=st.floats(0, 1),
)


@given(schedules, st.integers(25, 200), st.floats(1e-5, 1))
def test_rises_to_the_peak_then_never_rises_and_ends_at_the_final_ratio(schedule, total, peak):
    rates = [learning_rate(step, total, peak, schedule) for step in range(total)]
    warmup = schedule.warmup_steps
    assert rates[:warmup] == pytest.approx([peak * (i + 1) / warmup for i in range(warmup)])
    after = rates[warmup:]
    assert after[0] == pytest.approx(peak)
    assert all(a >= b - 1e-12 for a, b in pairwise(after))
    assert rates[-1] == pytest.approx(peak * schedule.final_lr_ratio, abs=1e-12)
    assert max(rates) <= peak * (1 + 1e-12)


def test_wsd_is_constant_until_it_cools():
    schedule = ScheduleConfig(kind="wsd", warmup_steps=10, decay_fraction=0.2, final_lr_ratio=0)
    rates = [learning_rate(step, 100, 1.0, schedule) for step in range(100)]
    assert set(rates[10:81]) == {1.0}
    assert rates[81] < 1.0


def test_cosine_is_halfway_in_the_middle():
    schedule = ScheduleConfig(kind="cosine", final_lr_ratio=0.1)
    assert learning_rate(50, 101, 2.0, schedule) == pytest.approx(1.1)
