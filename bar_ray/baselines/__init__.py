"""What a team would do without BAR: the baselines of the paper, as verbs of the same graph."""
