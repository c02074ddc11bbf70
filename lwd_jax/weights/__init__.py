"""Foreign checkpoints: two-way tables with exact cover, and the diffusers folders they are read from and written to."""
