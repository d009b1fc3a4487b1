"""Reading checkpoints without running any code of theirs, and without PyTorch."""
