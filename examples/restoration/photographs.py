"""Photographs that lie inside scikit-image's wheel, in grey; nothing is downloaded and none is part of this project.

Licences, as scikit-image's documentation gives them: CC0, public domain or without known restrictions; but the pair of
a motorcycle is of the Middlebury stereo benchmark (Scharstein et al., GCPR 2014), whose authors ask to be cited.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compressor.errors import CompressError

PHOTOGRAPHS = {
    "train": (
        "astronaut.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "brick.png", "grass.png",
        "moon.png", "retina.jpg", "hubble_deep_field.jpg", "ihc.png",
    ),
    "calibrate": ("clock_motion.png", "gravel.png", "cell.png"),
    "validate": ("camera.png", "chelsea.png", "coins.png", "rocket.jpg"),
}  # fmt: skip


def check() -> None:
    """Refuse to begin without scikit-image.

    Raises:
        CompressError: with the package to install.
    """
    if find_spec("skimage") is None:
        raise CompressError(
            "The photographs are scikit-image's, which is not installed: pip install 'taskpress[examples]'."
        )


@cache
def photographs(split: str) -> tuple[NDArray[np.float32], ...]:
    """Each (height, width) in [0, 1], read-only; kept in memory for the life of the process.

    Raises:
        CompressError: the installed scikit-image does not hold one of them.
    """
    check()
    import skimage
    from skimage.color import rgb2gray
    from skimage.io import imread

    found = []
    for name in PHOTOGRAPHS[split]:
        file = Path(skimage.__file__).parent / "data" / name
        if not file.is_file():
            raise CompressError(
                f"scikit-image {skimage.__version__} does not hold {name}. Install the one that pyproject.toml names."
            )
        picture = imread(file)
        grey = (rgb2gray(picture) if picture.ndim == 3 else picture / 255).astype(np.float32)
        grey.flags.writeable = False
        found.append(grey)
    return tuple(found)
