"""Pictures, captions, datasets, latents and the batches made of them."""
