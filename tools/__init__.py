"""Commands for those who work on this repository: measurements, plots, long checks."""
