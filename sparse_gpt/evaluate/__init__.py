"""Trained models, by their checkpoints' names: measured, made to write, inspected, exported."""
