"""Scaling experiments: grids of training runs, planned, run, resumed and fitted.

`grid.py` turns a sweep file into chains of runs, `calibration.py` measures how fast they will go,
`execute.py` trains what is missing, `collect.py` reads the points, `report.py` draws the fits.
"""
