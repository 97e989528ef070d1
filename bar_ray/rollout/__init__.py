"""Rollouts: vLLM engines in actors, weights on their way to them, and the sampler in between."""
