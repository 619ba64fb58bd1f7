"""How one image becomes one sample of a packed data set."""

from __future__ import annotations

import enum
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from hsrgan.engine.errors import UserError


class Crop(str, enum.Enum):
    none = "none"
    center = "center"
    skip = "skip"


class Filter(str, enum.Enum):
    lanczos = "lanczos"
    bicubic = "bicubic"
    bilinear = "bilinear"
    box = "box"


class Format(str, enum.Enum):
    png = "png"
    jpg = "jpg"
    webp = "webp"


class Unusable(Exception):
    """An image to leave out; the message is the reason."""


@dataclass(frozen=True)
class Recipe:
    """How one image becomes one sample."""

    resolution: int
    crop: Crop
    resize: Filter
    channels: int
    format: Format
    quality: int | None

    def apply(self, name: str, data: bytes) -> tuple[bytes, bool]:
        """Encoded source image -> (encoded sample, whether it had to be enlarged).

        Raises `Unusable` for an image to leave out, `UserError` for one that needs a decision.
        """
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
            image = _to_mode(ImageOps.exif_transpose(image), "RGB" if self.channels == 3 else "L")
        except Unusable:
            raise
        except Exception as error:  # a damaged file makes PIL raise nearly anything
            reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise Unusable(reason) from None
        width, height = image.size
        if width != height and self.crop is Crop.none:
            raise UserError(
                f"{name} is {width}x{height}, not square: give --crop center to cut squares from the middle, "
                "or --crop skip to leave such images out"
            )
        if width != height and self.crop is Crop.skip:
            raise Unusable(f"{width}x{height} is not square")
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side != self.resolution:
            image = image.resize((self.resolution, self.resolution), Image.Resampling[self.resize.name.upper()])
        return self._encode(image), side < self.resolution

    def _encode(self, image: Image.Image) -> bytes:
        out = io.BytesIO()
        if self.format is Format.png:
            image.save(out, "png", compress_level=3)  # half the time of the default 6, 4 % larger
        elif self.format is Format.jpg:
            image.save(out, "jpeg", quality=self.quality, subsampling=0)  # a generator would learn halved chroma
        else:
            image.save(out, "webp", quality=self.quality)
        return out.getvalue()


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """8-bit RGB or L: 16-bit values are divided by 256, transparent pixels lie over white."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise Unusable("floating-point pixels")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
