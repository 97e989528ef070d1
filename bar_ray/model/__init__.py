"""Models: branching, expert surgery, the freeze table, tensors on disk."""
