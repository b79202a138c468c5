"""Tokens on the disk: the format of a shard, the manifest of a folder, reading and verifying."""
