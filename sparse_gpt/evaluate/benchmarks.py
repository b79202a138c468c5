"""A trained model on the tasks of lm-eval (EleutherAI's harness; extra `eval`)."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn import functional as F

from sparse_gpt.errors import ConfigError, did_you_mean
from sparse_gpt.evaluate.checkpoint import Trained, on_devices
from sparse_gpt.evaluate.generate import TextStream
from sparse_gpt.model.gpt import GPT
from sparse_gpt.model.sampling import Sampling
from sparse_gpt.progress import Progress

T = TypeVar("T")
Scored = tuple[float, bool]  # log-likelihood of a continuation; whether it is the greedy one
Request = tuple[Any, list[int], list[int]]  # what it is cached under, context, continuation

_RESAMPLES = 1000  # for the standard errors that have no formula
_MOST_GENERATED = 256  # tokens, where a task does not say


def run_tasks(
    trained: Trained,
    tasks: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of lm-eval's tasks by their names, groups included.

    include_path: a folder of task files of one's own. limit: documents of each task. All GPUs share
    the work. Raises ConfigError for a task that is not there, with the nearest name, and for one
    whose data cannot be had.
    """
    for noisy in ("lm_eval", "lm-eval"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Its pool of processes for standard errors forks this one, threads and all, and can hang.
    os.environ["DISABLE_MULTIPROC"] = "1"
    manager = _manager(tasks, include_path)
    try:
        with redirect_stdout(sys.stderr):  # it talks
            found = simple_evaluate(
                model=Adapter(trained, batch_size),
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=_RESAMPLES,
            )
    except (OSError, ConnectionError) as error:
        raise ConfigError(
            f"--tasks: the data of a task cannot be had: {str(error).splitlines()[0]}"
        ) from None
    assert found is not None
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in values.items()
            if isinstance(value, int | float)
        }
        for task, values in found["results"].items()
    }


def _manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """What knows the tasks: one's own alone if they suffice; lm-eval's take seconds to find."""
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in tasks):
            return own
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if not manager.match_tasks([name]):
            hint = did_you_mean(name, manager.all_tasks)
            raise ConfigError(f"--tasks: there is no task {name!r}" + (f"; {hint}" if hint else ""))
    return manager


class Adapter(TemplateLM):  # type: ignore[misc]
    """What lm-eval asks of a model, of which each of `devices` has a copy. As lm-eval's own GPT-2,
    it puts no end of text before a context."""

    def __init__(
        self, trained: Trained, batch_size: int, devices: Sequence[torch.device] = ()
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.ids = trained.tokenizer
        self.max_length = trained.config.model.max_seq_len
        self.models = on_devices(trained.model, devices)

    @property
    def eot_token_id(self) -> int:
        return self.ids.eot

    @property
    def tokenizer_name(self) -> str:
        return self.ids.vocab_hash

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        found: list[int] = self.ids.encode(string).tolist()
        return found

    def _shared_out(
        self, work: Callable[[GPT, list[int]], list[T]], batches: Iterable[list[int]]
    ) -> Iterator[list[T]]:
        """Each batch's results, in the batches' order: a batch goes to the copy that is free."""
        free: SimpleQueue[GPT] = SimpleQueue()
        for model in self.models:
            free.put(model)

        @torch.no_grad()
        def one(batch: list[int]) -> list[T]:
            model = free.get()
            try:
                return work(model, batch)
            finally:
                free.put(model)

        with ThreadPoolExecutor(len(self.models)) as pool:
            yield from pool.map(one, batches)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        """Of each continuation after its context, of which the end counts where both are longer
        than the model's. Longest first, in batches padded at their ends: no token sees later ones.
        """
        order = sorted(range(len(requests)), key=lambda n: -sum(map(len, requests[n][1:])))
        batches = list(_chunks(order, self.batch_size))
        found: dict[int, Scored] = {}

        def scores(model: GPT, some: list[int]) -> list[Scored]:
            return self._scored(model, [requests[n][1:] for n in some])

        with Progress("log-likelihoods", len(order), not disable_tqdm, of_bytes=False) as bar:
            for some, scored in zip(batches, self._shared_out(scores, batches), strict=True):
                for n, score in zip(some, scored, strict=True):
                    found[n] = score
                    if requests[n][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[n][0], score)
                bar.at(len(found))
        return [found[n] for n in range(len(requests))]

    def _scored(self, model: GPT, pairs: list[tuple[list[int], list[int]]]) -> list[Scored]:
        device = model.wte.weight.device
        rows = [(context + wanted)[-self.max_length - 1 :] for context, wanted in pairs]
        longest = max(map(len, rows)) - 1
        padded = [row[:-1] + [self.ids.eot] * (longest + 1 - len(row)) for row in rows]
        scored: list[Scored] = []
        logits = model(torch.tensor(padded, device=device)).float()
        for row, (_, ids), scores in zip(rows, pairs, logits, strict=True):
            wanted = torch.tensor(ids[-self.max_length :], device=device)
            own = F.log_softmax(scores[len(row) - 1 - len(wanted) : len(row) - 1], -1)
            total = own.gather(1, wanted[:, None]).sum().item()
            scored.append((total, bool((own.argmax(-1) == wanted).all())))
        return scored

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token with as much before it as windows of the context leave."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (value, _) in zip(owners, scored, strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to one of its stops."""
        found = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        done = 0
        with Progress("texts", len(requests), not disable_tqdm, of_bytes=False) as bar:
            for group in alike.values():
                options = requests[group[0]].args[1]
                batches = list(_chunks(group, self.batch_size))

                def texts(
                    model: GPT, some: list[int], options: dict[str, Any] = options
                ) -> list[str]:
                    return self._continue(model, [requests[n].args[0] for n in some], options)

                for some, made in zip(batches, self._shared_out(texts, batches), strict=True):
                    for n, text in zip(some, made, strict=True):
                        found[n] = text
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    done += len(some)
                    bar.at(done)
        return found

    def _continue(self, model: GPT, contexts: list[str], options: dict[str, Any]) -> list[str]:
        stop = options.get("until") or []
        stop = [stop] if isinstance(stop, str) else list(stop)
        most = int(options.get("max_gen_toks") or options.get("max_tokens") or _MOST_GENERATED)
        samples = options.get("do_sample") or options.get("temperature", 0) > 0
        sampling = Sampling(
            temperature=float(options.get("temperature") or 1.0) if samples else 0.0,
            top_k=options.get("top_k") or None,
            top_p=float(options.get("top_p") or 1.0),
        )
        room = max(self.max_length - most, self.max_length // 2)
        rows = [self.tok_encode(text)[-room:] or [self.ids.eot] for text in contexts]
        longest = max(map(len, rows))
        tokens = torch.tensor([[self.ids.eot] * (longest - len(row)) + row for row in rows])
        device = model.wte.weight.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        streams = [TextStream(self.ids, stop) for _ in rows]
        texts = [""] * len(rows)
        steps = model.stream(tokens.to(device), most, sampling, lengths=lengths)
        for step in steps:
            for n, token in enumerate(step[:, 0].tolist()):
                texts[n] += streams[n].feed(token)
            if all(stream.finish for stream in streams):
                break
        return [text + stream.end() for text, stream in zip(texts, streams, strict=True)]


def _chunks(numbers: Iterable[int], size: int) -> Iterable[list[int]]:
    rest = iter(numbers)
    while some := list(islice(rest, size)):
        yield some
