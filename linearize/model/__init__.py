"""All that a checkpoint needs to run: torch and transformers only, relative imports."""
