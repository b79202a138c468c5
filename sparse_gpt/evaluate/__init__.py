"""Trained models, found by their checkpoints' names: measured, made to write, exported."""
