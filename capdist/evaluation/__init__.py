"""Free-running evaluation of a split, and the report at the end of a run."""
