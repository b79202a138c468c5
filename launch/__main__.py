"""`python -m launch`: the `sparse-gpt` command."""

from launch.cli import main

main()
