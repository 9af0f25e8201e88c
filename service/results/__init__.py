"""Questions about the history: rows, aggregates, comparisons, correlations, leaderboards, exports."""
