"""The photographs the bundled model learns from, and those it never sees.

They come with scikit-image and scikit-learn (installed by the ``train`` extra), so nothing is
downloaded; licences stand beside the names and in ``docs/tiny-model.md``.
"""

from __future__ import annotations

from importlib.resources import files

import cv2
import numpy as np

from ..errors import MachineError

# name -> (package, file, licence as stated by the package that ships it)
TRAINING: dict[str, tuple[str, str, str]] = {
    "motorcycle": ("skimage.data", "motorcycle_left.png", "CC0, from the Middlebury 2014 stereo data set"),
    "china": ("sklearn.datasets.images", "china.jpg", "CC BY 2.0, danielbuechele on Flickr"),
    "flower": ("sklearn.datasets.images", "flower.jpg", "CC BY 2.0, vultilion on Flickr"),
    "hubble": ("skimage.data", "hubble_deep_field.jpg", "public domain, NASA"),
    "retina": ("skimage.data", "retina.jpg", "CC0"),
    "ihc": ("skimage.data", "ihc.png", "no known copyright restrictions"),
    "camera": ("skimage.data", "camera.png", "CC0, Lav Varshney"),
    "moon": ("skimage.data", "moon.png", "public domain, NASA"),
    "brick": ("skimage.data", "brick.png", "CC0"),
    "grass": ("skimage.data", "grass.png", "CC0"),
    "gravel": ("skimage.data", "gravel.png", "CC0"),
    "coins": ("skimage.data", "coins.png", "no known copyright restrictions, Brooklyn Museum"),
}
HELD_OUT: dict[str, tuple[str, str, str]] = {
    "astronaut": ("skimage.data", "astronaut.png", "public domain, NASA"),
    "chelsea": ("skimage.data", "chelsea.png", "CC0, Stefan van der Walt"),
    "coffee": ("skimage.data", "coffee.png", "CC0, Rachel Michetti"),
    "rocket": ("skimage.data", "rocket.jpg", "CC0, SpaceX"),
}


def load_photograph(name: str) -> np.ndarray:
    """One of ``TRAINING`` or ``HELD_OUT`` as uint8 RGB (H, W, 3); grey ones have three equal channels.

    Raises MachineError if the package that ships it, or its file, is missing or damaged.
    """
    package, file, _ = {**TRAINING, **HELD_OUT}[name]
    install = 'pip install --force-reinstall "moebius-edge[train]"'
    try:
        data = np.frombuffer(files(package).joinpath(file).read_bytes(), np.uint8)
    except ModuleNotFoundError as error:
        raise MachineError(f'training needs {error.name}: pip install "moebius-edge[train]"') from error
    except OSError as error:
        raise MachineError(f"{package} lacks the photograph {file}: {install}") from error
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if image is None:
        raise MachineError(f"the photograph {file} of {package} is damaged: {install}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def random_crop(rng: np.random.Generator, image: np.ndarray, size: int) -> np.ndarray:
    """A square crop at a random scale, flipped, turned and recoloured at random; uint8 (size, size, 3).

    A dozen photographs are few: strong changes of colour keep the model from learning their palettes.
    """
    shortest = min(image.shape[:2])
    side = int(np.exp(rng.uniform(np.log(min(size * 0.6, shortest)), np.log(shortest))))
    y, x = (int(rng.integers(0, n - side + 1)) for n in image.shape[:2])
    crop = image[y : y + side, x : x + side]
    interpolation = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    crop = cv2.resize(crop, (size, size), interpolation=interpolation)
    crop = np.rot90(crop, int(rng.choice([0, 0, 0, 1, 2, 3])))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    colour = crop.astype(np.float32) / 255
    if rng.random() < 0.5:
        colour = colour[..., rng.permutation(3)]
    gain, gamma = rng.uniform(0.75, 1.2, 3), np.exp(rng.normal(0, 0.25))
    colour = np.clip(colour * gain, 0, 1) ** gamma
    if rng.random() < 0.08:
        colour = 1 - colour
    return np.ascontiguousarray((np.clip(colour, 0, 1) * 255).astype(np.uint8))
