"""The claims of the BAR paper, tested: every model they compare, the scores, the verdicts."""
