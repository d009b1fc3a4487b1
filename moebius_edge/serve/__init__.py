"""The HTTP service: ``app`` answers requests, ``forms`` reads them, and ``device`` queues them for a process.

That process is ``worker``, which owns the device. ``server`` listens, and ends in good order.
"""
