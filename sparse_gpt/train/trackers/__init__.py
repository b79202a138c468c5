"""Trackers beside TensorBoard: Weights & Biases, MLflow, CSV. They are copies of the record."""
