"""The work directory of a run: its record, metrics, returns, checkpoints, loading."""
