"""Training: data, masks, losses and the loops. Needs PyTorch (the ``train`` extra)."""
