"""One rank in this process, and a run on two data sets."""

import pytest
import yaml
from one_rank import batch, engine, train_here, world  # noqa: F401 - fixtures


@pytest.fixture
def blend_file(run_file, pair):
    """`run_file` on three samples of one novel to one of the other."""
    tree = yaml.safe_load(run_file.read_text())
    tree["data"] = {"blend": {pair[0]: 0.75, pair[1]: 0.25}}
    tree["duration"] = {"steps": 8}
    tree["log"]["batch_hash"] = True
    run_file.write_text(yaml.safe_dump(tree))
    return run_file
