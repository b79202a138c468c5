"""What a step takes on a cluster: its products, and beside them what goes over the links."""

import math
from dataclasses import dataclass, fields, replace

from rich.table import Table

NETWORK = 50e9
"""Bytes/s a direction of a GPU's port between nodes: 400 Gb/s InfiniBand, one a GPU."""

LATENCY = 30e-6
"""Seconds of an exchange between GPUs, however little is sent; assumed."""

REUSE = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance, in elements


@dataclass(frozen=True)
class Cluster:
    """GPUs and their links, in bytes/s a direction of each GPU."""

    gpus: int
    gpus_per_node: int
    link: float  # to the others of its node
    network: float = NETWORK  # its share of the node's way out
    latency: float = LATENCY  # seconds of an exchange of nothing

    @property
    def bandwidth(self) -> float:
        """Of a gather or reduction over all GPUs, which passes each node's border once, by all of
        its ports."""
        if self.gpus <= self.gpus_per_node:
            return self.link
        return min(self.link, self.gpus_per_node * self.network)

    def replicas(self, ranks: int) -> "Cluster":
        """The GPUs that hold the same blocks, where each `ranks` neighbours share them. Groups of
        such have the ports of a node in common."""
        per_node = max(1, self.gpus_per_node // ranks)
        return replace(self, gpus=self.gpus // ranks, gpus_per_node=per_node)

    def exchange_seconds(self, sent: float, times: int, ranks: int) -> float:
        """Of bytes that a GPU sends `times` over, alike to each other of `ranks` neighbours: to
        those of its node and to those outside at once, the latter by its own port."""
        near = ranks if self.gpus <= self.gpus_per_node else math.gcd(ranks, self.gpus_per_node)
        inside = sent * (near - 1) / (ranks - 1)
        return max(inside / self.link, (sent - inside) / self.network) + times * self.latency


@dataclass(frozen=True)
class StepCost:
    """A step of one rank: seconds of its products, bytes it sends and their seconds.

    DeepSpeed hides some gathers and reductions behind products, and which is not foreseen. Products
    wait for an exchange: nothing hides it.
    """

    products_seconds: float
    gathered_bytes: float
    reduced_bytes: float
    gather_seconds: float
    reduce_seconds: float
    exchanged_bytes: float = 0.0
    exchange_seconds: float = 0.0

    def __add__(self, other: "StepCost") -> "StepCost":
        """What takes both, one after the other."""
        both = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return StepCost(*(a + b for a, b in both))

    @property
    def links_seconds(self) -> float:
        """Of all that goes over the links."""
        return self.gather_seconds + self.reduce_seconds + self.exchange_seconds

    @property
    def seconds(self) -> tuple[float, float]:
        """Of the step: if the links are hidden as far as they can be, and if nothing is."""
        waited = self.products_seconds + self.exchange_seconds
        return max(waited, self.links_seconds), self.products_seconds + self.links_seconds


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


def exchange_cost(
    cluster: Cluster,
    ranks: int,
    rows: int,
    calls: int,
    d_model: int,
    width: int,
    blocks: int,
    again: bool,
) -> StepCost:
    """Of the rows of a step where blocks are over `ranks`, more than one, alike loaded.

    rows: tokens × blocks of a token × layers; each goes with its gain, comes back, and so do their
    gradients. calls: layers × micro-batches; each tells how many rows every block gets. width:
    bytes of a number of a row. again: whether the forward is computed again for the backward.
    """
    there_and_back = rows * (2 * d_model * width + 4)
    forward, times = 1 + again, (1 + again) * 4 + 3
    sent = (forward * (there_and_back + calls * blocks * 8) + there_and_back) * (ranks - 1) / ranks
    return StepCost(0, 0, 0, 0, 0, sent, cluster.exchange_seconds(sent, times * calls, ranks))


def step_cost(
    cluster: Cluster, products_seconds: float, gathered: float, reduced: float
) -> StepCost:
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
    if any(step.exchanged_bytes for step in all_steps):
        row("exchanged, GB", [f"{step.exchanged_bytes / 1e9:.3g}" for step in all_steps])
        row("  s", [f"{step.exchange_seconds:.3g}" for step in all_steps])
    row("a step, s: from", [f"{step.seconds[0]:.3g}" for step in all_steps], "bold")
    row("  to", [f"{step.seconds[1]:.3g}" for step in all_steps], "bold")
    return table
