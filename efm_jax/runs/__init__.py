"""The work directory of a run: configuration, metrics, returns, checkpoints, learning curve, loading, export."""
