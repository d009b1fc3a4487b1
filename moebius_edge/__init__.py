"""moebius-edge: put the Moebius inpainting network (arXiv 2606.19195) on a Jetson, a GPU or a CPU."""

__version__ = "0.1.0"
