"""The committed losses are those of this source, and another computation is told from rounding."""

import importlib.util
import json
import math
import sys

import pytest
from ranks import ENVIRONMENT, ROOT, start

SCRIPT = ROOT / "scripts/compare_losses.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_losses", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def expected(script):
    return json.loads(script.EXPECTED.read_text())


@pytest.fixture
def found(expected):
    """The committed losses, as a training would find them."""
    return {name: list(losses.values()) for name, losses in expected["losses"].items()}


@pytest.mark.long
def test_the_first_20_steps_of_the_quickstart_are_the_committed_ones():
    process = start([sys.executable, SCRIPT], stdout=-1, stderr=-2, env=ENVIRONMENT)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output


def test_every_run_file_of_that_size_has_expected_losses(script, expected):
    names = {path.stem for path in (ROOT / "configs").glob("tiny-*.yaml")}
    assert set(expected["losses"]) == set(expected["rounding"]) == names
    for losses in expected["losses"].values():
        assert list(losses) == [str(step) for step in range(1, script.STEPS + 1)]
        assert losses["1"] == pytest.approx(math.log(50257), abs=0.2)  # a guess
        assert losses["20"] < losses["1"] - 1


def test_equal_losses_are_equal_to_the_bit(script, expected, found):
    said, good = script.compare(expected, found)
    assert good
    assert said.splitlines() == [f"{name}: equal to the bit" for name in found]


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-sparse", "tiny-paper"])
def test_what_other_orders_make_is_rounding(script, expected, found, name):
    gaps = expected["rounding"][name].values()
    found[name] = [loss * (1 + gap) for loss, gap in zip(found[name], gaps, strict=True)]
    said, good = script.compare(expected, found)
    assert good
    assert f"{name}: within rounding: from step" in said


@pytest.mark.parametrize(
    ("name", "step", "factor"),
    [("tiny-dense", 2, 1 + 4e-6), ("tiny-sparse", 5, 1 + 1e-5), ("tiny-paper", 1, 1.001)],
)
def test_more_is_another_computation_from_the_step_on(script, expected, found, name, step, factor):
    """For the first two, what a learning rate that is larger by a thousandth makes."""
    found[name] = [loss * (factor if at >= step else 1) for at, loss in enumerate(found[name], 1)]
    said, good = script.compare(expected, found)
    assert not good
    [line] = [line for line in said.splitlines() if line.startswith(f"{name}: ")]
    assert line.startswith(f"{name}: ANOTHER COMPUTATION: from step {step} on other losses, at st")
    assert said.count("equal to the bit") == len(found) - 1


def test_nan_is_never_rounding(script, expected, found):
    found["tiny-dense"][7] = math.nan
    said, good = script.compare(expected, found)
    assert not good
    assert "from step 8 on other losses, at step 8 by nan" in said


def test_a_new_run_file_wants_expected_losses(script, expected, found):
    said, good = script.compare(expected, {**found, "tiny-new": [10.8] * script.STEPS})
    assert not good
    assert "tiny-new: has no expected losses; commit them with --update" in said


def test_a_schedule_by_the_runs_length_is_refused(script, tmp_path):
    base = (ROOT / "configs/tiny-dense.yaml").read_text()
    path = tmp_path / "short.yaml"
    path.write_text(base.replace("warmup_steps: 25", "warmup_steps: 20"))
    script.check_schedule(path)
    path.write_text(base.replace("warmup_steps: 25", "warmup_steps: 10"))
    with pytest.raises(Exception, match=r"the learning rate of step 12 depends on the run's le"):
        script.check_schedule(path)
