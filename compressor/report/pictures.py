"""Answers to look at: the same input before and after compression."""

import base64
import io
from typing import TYPE_CHECKING

from compressor.errors import CompressError
from compressor.report.blocks import Gallery, Section
from compressor.report.schema import Report

if TYPE_CHECKING:
    import numpy as np


def png(image_HW3: "np.ndarray") -> str:
    """A base64 PNG of an image, rows first.

    Args:
        image_HW3: uint8 or float in [0, 1], shape (height, width, 3) or (height, width) for grey.

    Raises:
        CompressError: another shape or type.
    """
    import numpy as np
    from matplotlib.image import imsave

    image = np.asarray(image_HW3)
    if image.dtype.kind == "f" and np.isfinite(image).all():
        image = (image.clip(0, 1) * 255).round().astype(np.uint8)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise CompressError(
            f"A picture is (H, W) or (H, W, 3), uint8 or float in [0, 1]; got {image.shape} {image.dtype}."
        )
    file = io.BytesIO()
    colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    imsave(file, colour, format="png", metadata={"Software": "taskpress"})
    return base64.b64encode(file.getvalue()).decode("ascii")


def section(report: Report) -> Section | None:
    """None when there are no pictures."""
    if not report.pictures:
        return None
    optional = {"Input": "input_png_base64", "Truth": "truth_png_base64"}
    fields: dict[str, str] = {
        head: field for head, field in optional.items() if any(getattr(p, field) for p in report.pictures)
    }
    fields |= {"Before": "before_png_base64", "After": "after_png_base64"}
    rows = tuple(
        (
            p.name if p.name == p.task else f"{p.name}, {p.task}",
            tuple(getattr(p, field) for field in fields.values()),
        )
        for p in report.pictures
    )
    lead = "Before is the original network, after the compressed one."
    return Section("Pictures", (Gallery(tuple(fields), rows),), lead)
