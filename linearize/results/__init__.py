"""The results file: what is in it, how it is read and written, summed up and laid out as a table."""
