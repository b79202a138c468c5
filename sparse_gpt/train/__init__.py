"""A run: the loop and what surrounds it on every rank. `python -m sparse_gpt.train` is one rank."""
