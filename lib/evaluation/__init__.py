"""Measuring a pair of towers: the shared embedding pass, one module per task, plots and the HTML report."""
