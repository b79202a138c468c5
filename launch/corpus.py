"""The data that a run's configuration names, and whether they last for the run."""

from bisect import bisect_right
from functools import partial

from data import Blend, open_blend, open_shards
from data.batches import count_windows
from data.order import blend_counts
from launch.config import DataConfig, RunConfig
from launch.costs import model_report
from launch.errors import ConfigError


def open_data(config: DataConfig) -> Blend:
    """Open `data.path` or `data.blend`. Raises DataError."""
    if config.blend is not None:
        return open_blend({path: source.weight for path, source in config.blend.items()})
    assert config.path is not None
    return Blend.of_one(open_shards(config.path))


def check_epochs(config: RunConfig, blend: Blend) -> None:
    """Raises ConfigError if the run would read a source more often than its `max_epochs`."""
    given = config.data.blend or {}
    seq_len, quotas = config.model.max_seq_len, blend.quotas
    windows = [count_windows(source.dataset.train, seq_len) for source in blend.sources]
    own = [given[source.folder].max_epochs if given else None for source in blend.sources]
    caps = [epochs or config.data.max_epochs for epochs in own]
    if not any(caps):
        return
    report = model_report(config.model)
    steps = config.total_steps(report.training / report.seq)

    def read(source: int, after: int) -> int:
        return int(blend_counts(after * config.global_batch, quotas, config.seed)[source])

    fits = [steps] * len(caps)  # so many steps of the run does each source last for
    for number, cap in enumerate(caps):
        if cap:
            limit = int(cap * windows[number])
            fits[number] = bisect_right(range(1, steps + 1), limit, key=partial(read, number))
    fit = min(fits)
    if fit == steps:
        return
    scarce = fits.index(fit)
    folder, smaller = blend.sources[scarce].folder, ""
    if len(given) > 1 and fit:
        share = fit / steps * quotas[scarce] / quotas.sum()
        others = sum(source.weight for path, source in given.items() if path != folder)
        smaller = f", or {steps:,} with a weight under {others * share / (1 - share):.3g}"
    raise ConfigError(
        f"data: {folder} would be read {read(scarce, steps) / windows[scarce]:.2f} times in "
        f"{steps:,} steps, above its max_epochs of {caps[scarce]:g}; {fit:,} steps "
        f"({fit * config.batch.global_tokens:,} tokens) are possible{smaller}"
    )
