"""Training: a run's plan, its step, its state, its teacher, the loop."""
