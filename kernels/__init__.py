"""Kernels of few-expert mixture models: torch on CPU, Triton on GPU, a short reference of each.

They know nothing of bar_ray. Shapes: N tokens, D model width, I FFN width, E experts, V vocabulary.
"""
