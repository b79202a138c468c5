"""Runs on a machine that errs: see train/faulty_train.py."""

from ranks import ROOT

FAULTY = ROOT / "tests/train/faulty_train.py"


def options(zero_stage, precision="fp32", **guard):
    section = ", ".join(f"{key}: {value}" for key, value in guard.items())
    return (
        f"deepspeed={{zero_optimization: {{stage: {zero_stage}}}}}",
        f"precision={precision}",
        f"guard={{{section}}}",
    )


def faults(*pairs):
    return [word for kind, step in pairs for word in ("--fault", kind, str(step))]


def stopped(ranks):
    """The one error line of ranks that must all stop."""
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1] * len(ranks), outputs
    [error] = [line for line in outputs[0].splitlines() if line.startswith("error: ")]
    assert "Traceback" not in "".join(outputs)
    return error
