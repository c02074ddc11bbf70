"""One training step for both stages, its state, its checkpoints and the loop around it."""
