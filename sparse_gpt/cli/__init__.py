"""The `sparse-gpt` command: thin, each command calls the room that does the work."""
