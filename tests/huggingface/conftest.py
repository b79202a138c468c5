"""The fixtures that these tests share with those of `model`."""

from ffn_options import _seed, model_config, wake  # noqa: F401
