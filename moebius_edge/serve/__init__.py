"""The HTTP service: ``app`` answers requests, ``forms`` reads them, and ``device`` queues them for a process.

That process is ``worker``, which owns the device. ``guard`` says who may ask; ``server`` listens, and ends cleanly.
"""
