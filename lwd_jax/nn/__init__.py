"""What two models share: layers, attention, positions, modulation, conditioning."""
