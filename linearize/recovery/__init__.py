"""What recovers the quality that a conversion costs: calibration, selection, training, merging."""
