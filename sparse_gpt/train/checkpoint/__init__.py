"""Checkpoints that are whole or not there, read at any ZeRO stage and world size."""
