"""What is used of DeepSpeed and torch beyond their public names is there; bounds and pins agree."""

import inspect
import re
from importlib import import_module
from importlib.metadata import metadata, requires, version

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ranks import ROOT

EXTRAS = metadata("sparse-gpt").get_all("Provides-Extra")
ATTRIBUTES = [
    # train/guard.py: the norm by which each ZeRO stage decides
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.scaled_global_norm",
    "deepspeed.runtime.bf16_optimizer:BF16_Optimizer.get_grads_for_norm",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._get_norm_groups",
    "deepspeed.runtime.utils:get_global_norm_of_tensors",
    "deepspeed.runtime.utils:combine_grad_norm_groups",
    "deepspeed.runtime.engine:DeepSpeedEngine.was_step_applied",
    # train/checkpoint/zero_state.py: where a rank's part of the state lies
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.update_lp_params",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.get_param_id",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.checkpoint_event_prologue",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.checkpoint_event_epilogue",
    "deepspeed.runtime.zero.stage3:"
    "DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters",
    # train/engine.py, train/incident.py
    "deepspeed.ops:__compatible_ops__",
    "deepspeed.utils:set_z3_leaf_modules",
    "deepspeed.utils:logger",
    "deepspeed.runtime.zero:GatheredParameters",
    # train/distributed.py
    "torch.distributed.distributed_c10d:_world.pg_map",
    "torch.distributed.distributed_c10d:_set_pg_timeout",
    "torch.distributed:TCPStore",
    # train/component_profile.py, train/engine.py, train/replay.py
    "torch.nn:Module._compiled_call_impl",
    "torch:_foreach_copy_",
    "torch:_foreach_add_",
    # plan/memory.py, train/telemetry.py
    "torch._subclasses.fake_tensor:FakeTensorMode",
    "torch.utils.tensorboard:SummaryWriter._get_file_writer",
]
WRITTEN = [  # attributes of instances, and options, by the module that makes them
    ("deepspeed.runtime.zero.stage3", r"self\.grad_position\b"),
    ("deepspeed.runtime.zero.stage3", r"self\.fp32_partitioned_groups_flat\b"),
    ("deepspeed.utils.mixed_precision_linkage", r"\._hp_mapping\b"),
    ("deepspeed.utils.tensor_fragment", r"lp_fragment_address: fragment_address"),
    ("deepspeed.utils.tensor_fragment", r"hp_fragment_address: fragment_address"),
    ("deepspeed.utils.tensor_fragment", r"param_group_index: int"),
    ("deepspeed.runtime.fp16.loss_scaler", r"self\.raise_error_at_min_scale\b"),
    ("deepspeed.launcher.runner", r'"--module"'),
]


@pytest.mark.parametrize("place", ATTRIBUTES)
def test_a_private_name_is_there(place):
    module, _, path = place.partition(":")
    found = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)


@pytest.mark.parametrize(("module", "pattern"), WRITTEN)
def test_an_instance_has_what_is_read_of_it(module, pattern):
    assert re.search(pattern, inspect.getsource(import_module(module)))


def requirements():
    found = map(Requirement, requires("sparse-gpt"))
    return [one for one in found if one.name != "sparse-gpt"]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_requirement_has_both_bounds_and_what_is_installed_is_within(requirement):
    operators = {clause.operator for clause in requirement.specifier}
    assert operators >= {">=", "<"}
    marker = requirement.marker
    if marker is None or any(marker.evaluate({"extra": extra}) for extra in EXTRAS):
        assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_the_pins_are_within_the_bounds():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line:
            pin = Requirement(line)
            pins.setdefault(pin.name.lower().replace("_", "-"), []).append(pin.specifier)
    for requirement in requirements():
        for pin in pins[requirement.name.lower()]:
            [clause] = pin
            assert SpecifierSet(str(requirement.specifier)).contains(clause.version), requirement
