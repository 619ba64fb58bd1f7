"""How one image becomes one sample of a packed data set."""

from __future__ import annotations

import enum
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from hsrgan.engine.errors import UserError
from hsrgan.engine.sizes import in_words


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
    """How one image becomes one sample. resolution: (height, width)."""

    resolution: tuple[int, int]
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
            image = _to_mode(ImageOps.exif_transpose(image), {1: "L", 3: "RGB", 4: "RGBA"}[self.channels])
        except Unusable:
            raise
        except Exception as error:  # a damaged file makes PIL raise nearly anything
            reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise Unusable(reason) from None
        (width, height), (wanted_height, wanted_width) = image.size, self.resolution
        if width * wanted_height != height * wanted_width:
            square = wanted_height == wanted_width
            size = f"{width}x{height}" if square else in_words((height, width))
            shape = "square" if square else f"of the shape {in_words(self.resolution)}"
            if self.crop is Crop.none:
                raise UserError(
                    f"{name} is {size}, not {shape}: give --crop center to cut {'squares' if square else 'it'} from "
                    "the middle, or --crop skip to leave such images out"
                )
            if self.crop is Crop.skip:
                raise Unusable(f"{size} is not {shape}")
        # the largest part of the wanted shape, of the side that bounds it all
        part_width = min(width, max(1, round(height * wanted_width / wanted_height)))
        part_height = min(height, max(1, round(width * wanted_height / wanted_width)))
        left, top = (width - part_width) // 2, (height - part_height) // 2
        image = image.crop((left, top, left + part_width, top + part_height))
        if image.size != (wanted_width, wanted_height):
            image = image.resize((wanted_width, wanted_height), Image.Resampling[self.resize.name.upper()])
        return self._encode(image), part_width < wanted_width or part_height < wanted_height

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
    """8-bit: 16-bit values are divided by 256. L and RGB: transparent pixels lie over white. RGBA: straight alpha, 255
    where there is none.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray(np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise Unusable("floating-point pixels")
    if image.has_transparency_data and mode != "RGBA":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
