"""Pictures and masks to train and calibrate on. Needs no PyTorch."""
