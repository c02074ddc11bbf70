"""What is trained: wavelets, saliency, masks, paths and the losses of both stages. Knows no model."""
