"""The FFN options of the models' tests."""

from ffn_options import model_config, seed, wake  # noqa: F401 - fixtures
