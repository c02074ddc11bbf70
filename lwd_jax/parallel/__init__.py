"""Where arrays live: the device mesh, and the tables that say how parameters and batches are laid over it."""
