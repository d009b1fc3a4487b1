"""The mathematics of sampling, in NumPy: the noise schedules and classifier-free guidance."""
