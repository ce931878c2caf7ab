"""A run, seen from its directory: what `tools/status.py`, `report_run.py` and `plot_run.py` are made of."""
