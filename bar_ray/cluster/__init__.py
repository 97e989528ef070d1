"""The cluster: the pool, the run's journal, executing a plan."""
