"""The bundle: the directory that ``export`` writes and ``run`` reads, and the description in its ``bundle.json``."""
