"""Training: DeepSpeed behind four verbs, losses, schedules, checkpoints of a stage."""
