"""What a step takes on a cluster: its products, and beside them what goes over the links."""

from dataclasses import dataclass

from rich.table import Table

NETWORK = 50e9
"""Bytes/s a direction of a GPU's port between nodes: 400 Gb/s InfiniBand, one a GPU."""

REUSE = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance, in elements


@dataclass(frozen=True)
class Cluster:
    """GPUs and their links, in bytes/s a direction of each GPU."""

    gpus: int
    gpus_per_node: int
    link: float  # to the others of its node
    network: float = NETWORK  # its share of the node's way out

    @property
    def bandwidth(self) -> float:
        """Of a gather or reduction over all GPUs, which passes each node's border once, by all of
        its ports."""
        if self.gpus <= self.gpus_per_node:
            return self.link
        return min(self.link, self.gpus_per_node * self.network)


@dataclass(frozen=True)
class StepCost:
    """A step of one rank: seconds of its products, bytes it sends and their seconds.

    DeepSpeed hides some of it behind products, and which is not foreseen: a step takes between
    the longer of the two and their sum.
    """

    products_seconds: float
    gathered_bytes: float
    reduced_bytes: float
    gather_seconds: float
    reduce_seconds: float

    @property
    def links_seconds(self) -> float:
        """Of all that goes over the links."""
        return self.gather_seconds + self.reduce_seconds

    @property
    def seconds(self) -> tuple[float, float]:
        """Of the step: if the links are hidden as far as they can be, and if nothing is."""
        both = (self.products_seconds, self.links_seconds)
        return max(both), sum(both)


def gathered_elements(parameters: int, stage: int, micro_batches: int, reuse: int = REUSE) -> int:
    """Weights that each rank needs of all others in a step, as DeepSpeed 0.19.8 gathers them.

    Once after the update in ZeRO-1 and 2. ZeRO-3 gathers all for a forward and all for its
    backward, but keeps the last ones, between whose uses fewer than `reuse` elements lie.
    """
    if stage < 3:
        return parameters if stage else 0
    return micro_batches * (2 * parameters - kept_gathered(parameters, reuse))


def kept_gathered(parameters: int, reuse: int = REUSE) -> int:
    """Weights that ZeRO-3 holds whole at the loss: on the way back they come soon enough."""
    return min(parameters, reuse // 2)


def reduced_elements(parameters: int, stage: int, micro_batches: int) -> int:
    """Gradients that a rank sends in a step. ZeRO-0 to 2 all-reduce them, which is twice a
    reduction to a share; ZeRO-2 and 3 do it each micro-batch."""
    return parameters * (1 if stage == 3 else 2) * (micro_batches if stage > 1 else 1)


def step_cost(cluster: Cluster, products_seconds: float, gathered: int, reduced: int) -> StepCost:
    """Of bytes gathered and reduced, of which a rank has its own share already."""
    others = (cluster.gpus - 1) / cluster.gpus
    sent = (gathered * others, reduced * others)
    return StepCost(products_seconds, *sent, *(size / cluster.bandwidth for size in sent))


def step_table(steps: dict[int, StepCost], configured: int, title: str) -> Table:
    """A column a ZeRO stage."""
    table = Table(
        title=title,
        caption="Weights gathered and gradients reduced, in GB that a rank sends, an all-reduce "
        "counted twice. How much of it is hidden behind the products is not foreseen.",
    )
    table.add_column("")
    for stage in steps:
        own = " (this run)" if stage == configured else ""
        table.add_column(f"ZeRO-{stage}{own}", justify="right")

    def row(name: str, cells: list[str], style: str = "") -> None:
        table.add_row(name, *cells, style=style)

    all_steps = steps.values()
    row("products, s", [f"{step.products_seconds:.3g}" for step in all_steps])
    row("gathered, GB", [f"{step.gathered_bytes / 1e9:.3g}" for step in all_steps])
    row("  s", [f"{step.gather_seconds:.3g}" for step in all_steps])
    row("reduced, GB", [f"{step.reduced_bytes / 1e9:.3g}" for step in all_steps])
    row("  s", [f"{step.reduce_seconds:.3g}" for step in all_steps])
    row("a step, s: from", [f"{step.seconds[0]:.3g}" for step in all_steps], "bold")
    row("  to", [f"{step.seconds[1]:.3g}" for step in all_steps], "bold")
    return table
