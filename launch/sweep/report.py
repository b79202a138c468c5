"""Draws a sweep: fitted curves in TensorBoard, and as PNG, CSV and JSON."""

from launch.sweep.grid import Sweep


def draw_points(sweep: Sweep) -> None:
    """Nothing yet."""
