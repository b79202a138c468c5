"""Processes, engines, clusters and people: what turns a YAML file into a training run.

This room is the only one that knows DeepSpeed, the command line and the folders of a run.
It builds on `data` (corpora become batches) and `sparse_gpt` (the model and what it costs), which
know nothing of it.
"""
