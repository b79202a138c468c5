"""`python -m sparse_gpt`: the `sparse-gpt` command."""

from sparse_gpt.cli.main import main

main()
