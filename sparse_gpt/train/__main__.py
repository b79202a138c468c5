"""`python -m sparse_gpt.train`: one rank, as a launcher starts it."""

from sparse_gpt.train.rank import main

main()
