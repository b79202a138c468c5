"""`sparse-gpt flops` and `sparse-gpt plan`: what a model costs, and a run."""

from typing import Annotated

import typer

from sparse_gpt.cli.terminal import Config, Json, Overrides, print_json, show


def flops(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """FLOPs a token by block and component, dense beside sparse."""
    from sparse_gpt.config.load import load_config
    from sparse_gpt.plan.flops_table import costs_json, costs_table

    model = load_config(config, overrides or []).model
    if as_json:
        print_json(costs_json(model))
    else:
        show(costs_table(model))


def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks of the run, one a GPU.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(help="Which: A100-80GB, MI300X, RTX-4090, ...", show_default="H100"),
    ] = None,
    peak_tflops: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|measure",
            help="TFLOP/s of a GPU in dense bf16; measure: of the one here.",
            show_default="its data sheet's",
        ),
    ] = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="GiB that a process can have of a GPU.", show_default="its data sheet's"
        ),
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the peak that will be reached.")
    ] = 0.4,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that share fast links.")] = 8,
    network: Annotated[
        float, typer.Option(min=0.1, help="GB/s a direction of a GPU's port between nodes.")
    ] = 50,
    as_json: Json = False,
) -> None:
    """Memory of a rank and a step's traffic by ZeRO stage, FLOPs, time and warnings."""
    from sparse_gpt.config.load import load_config
    from sparse_gpt.plan.plan import given_gpu, make_plan, plan_blocks, plan_steps, plan_table

    run = load_config(config, overrides or [])
    memory = None if memory_gb is None else int(memory_gb * 2**30)
    gpu, peak, memory = given_gpu(gpu, peak_tflops, memory)
    made = make_plan(run, gpus, gpu, mfu, gpus_per_node, network * 1e9, peak, memory)
    if as_json:
        print_json(made.to_dict())
        return
    show(plan_table(made))
    if gpus > 1:
        show(plan_steps(made))
    if len(made.sharings) > 1:
        show(plan_blocks(made))
    for warning in made.warnings:
        print(f"warning: {warning}")
