"""From a picture with a mask to a filled picture: the denoising loop, its presets, and the ``Inpainter``."""
