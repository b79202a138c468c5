"""What `log.trace` shows of some steps, and that it changes none of them."""

import gzip
import json

import pytest
from ranks import exact, stage
from torch import nn

from sparse_gpt.model.flops import count_flops
from sparse_gpt.train.component_profile import ComponentProfile
from sparse_gpt.train.trace import Trace


def ranges(folder):
    """Those of a trace by name, each `(begin, end)` in microseconds."""
    with gzip.open(folder / "rank-0.pt.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    found = {}
    for event in events:
        if event.get("ph") == "X":
            span = (event["ts"], event["ts"] + event["dur"])
            found.setdefault(event["name"], []).append(span)
    return found


def inside(spans, others):
    return all(any(a <= begin and end <= b for a, b in others) for begin, end in spans)


LONG = (
    ("paper", stage(3), "precision=bf16"),
    ("light", stage(0), "activation_checkpointing=selective"),
    ("default", stage(2), "activation_checkpointing=full"),
    ("dense", stage(1), "model.dropout=0.1"),
)


@pytest.mark.parametrize(
    "options",
    [("default",), *(pytest.param(options, marks=pytest.mark.long) for options in LONG)],
)
def test_parts_and_phases_have_names_and_the_steps_are_as_ever(train_here, tmp_path, options):
    ffn, *others = options
    options = (f"model.ffn={ffn}", *others, "duration.steps=3")
    plain, traced = tmp_path / "plain", tmp_path / "traced"
    train_here(*options, f"run_dir={plain}")
    train_here(*options, f"run_dir={traced}", "log.trace={at: 2, steps: 2}")
    assert exact(traced) == exact(plain)

    folder = traced / "tensorboard/plugins/profile/step-00000002"
    assert [path.name for path in folder.iterdir()] == ["rank-0.pt.trace.json.gz"]
    found = ranges(folder)
    assert sum(name.startswith("ProfilerStep") for name in found) == 2
    for phase in ("forward", "backward", "optimizer"):
        assert len(found[f"deepspeed {phase}"]) == 8  # of 4 micro-batches a step
    part = "block_01/ffn" if ffn == "dense" else "block_01/ffn.spectral"
    for name in ("block_00/attention", part):
        assert len(found[name]) in (8, 16)  # where it is computed again
        assert len(found[f"{name} backward"]) == 8
        assert inside(found[name], found["deepspeed forward"] + found["deepspeed backward"])
        assert inside(found[f"{name} backward"], found["deepspeed backward"])
    if ffn == "default":
        spectra = [found[f"block_{number:02}/ffn.spectral"] for number in (0, 1)]
        assert inside(found["Spectrum"], [span for each in spectra for span in each])


@pytest.fixture
def traced(engine, batch, tmp_path):
    """Makes a trace, and a step of its engine, given how many are completed."""

    def make(settings):
        made = engine(f"log.trace={settings}", "model.ffn=dense")
        report = count_flops(made.module, batch=1, seq=32)
        profile = ComponentProfile(made.module, report, made.world.device)
        trace = Trace(made, profile.components, tmp_path)

        def step(completed):
            data = batch(completed)
            with trace.around(completed):
                made.step(data.tokens, data.targets, completed)
            trace.after_step()

        return made, step

    return make


def hooks(module: nn.Module):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return [len(getattr(each, kind)) for each in module.modules() for kind in kinds]


def test_it_begins_where_the_run_does_and_nothing_of_it_stays(traced, tmp_path, capfd):
    engine, step = traced("{at: 3}")
    before, methods = hooks(engine.deepspeed), set(vars(engine.deepspeed))
    folder = tmp_path / "tensorboard/plugins/profile/step-00000003"
    assert not folder.exists()
    step(2)  # as a run that has resumed there
    assert len(ranges(folder)["deepspeed forward"]) == 4
    assert (hooks(engine.deepspeed), set(vars(engine.deepspeed))) == (before, methods)
    (folder / "rank-0.pt.trace.json.gz").unlink()
    for completed in (1, 2):  # a rollback
        step(completed)
    assert not list(folder.iterdir())
    out, err = capfd.readouterr()
    assert (out, err) == (f"traced: {folder}\n", "")


def test_a_disk_that_does_not_take_it_stops_nothing(traced, tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    _, step = traced("{at: 1}")
    step(0)
    said = capsys.readouterr().err
    assert said.startswith("warning: log.trace: nothing is kept of it: ")
    assert "Not a directory" in said
    step(1)
