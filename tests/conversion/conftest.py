"""Fixtures that several files here share."""

from helpers.conversion import scaled_mixer, sharded_folder

__all__ = ["scaled_mixer", "sharded_folder"]
