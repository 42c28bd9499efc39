"""Plans of comparisons, their runs and tables."""
