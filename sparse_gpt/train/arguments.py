"""What a rank is given on its command line, and words on their way through shells to it."""

import argparse
import base64
import json
import re
from collections.abc import Sequence

PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)  # what no shell reads as anything else


def encoded(words: Sequence[str]) -> list[str]:
    """The arguments of a rank in words that every shell leaves alone: themselves where they are
    such, else one that stands for all."""
    if all(map(PLAIN.fullmatch, words)):
        return list(words)
    packed = base64.urlsafe_b64encode(json.dumps(list(words)).encode()).decode()
    return ["--encoded", packed]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """`config` and `overrides`, of these words or the command line's."""
    parser = argparse.ArgumentParser(description="One rank of a training run.")
    parser.add_argument("--config", help="a run file, or the name of one of configs/")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    parser.add_argument("--job", help="what the ranks of one job are found by on its hosts")
    parser.add_argument("--encoded", help="config and overrides, as sparse-gpt train sends them")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=1e-3")
    found = parser.parse_intermixed_args(words)
    if found.encoded:
        return parse(json.loads(base64.urlsafe_b64decode(found.encoded)))
    if not found.config:
        parser.error("the following arguments are required: --config")
    return found
