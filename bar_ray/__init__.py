"""bar_ray: modular post-training of language models on a Ray cluster (Branch-Adapt-Route)."""

__version__ = "0.1.0"
