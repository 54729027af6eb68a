"""All that a checkpoint needs to run: torch and transformers only, relative imports."""

from . import modeling as modeling  # registers the model type, whichever module of this package comes first
