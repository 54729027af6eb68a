"""Compare a linearized model with its source and with untrained controls, under the same settings."""
