"""Chunk indexes: what stays on the device of every chunk's keys, so that queries can tell which chunks matter."""
