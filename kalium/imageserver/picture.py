"""The picture of the benchmark: drawn, so that nobody's photograph is needed, and of exactly the published size.

The same Pillow draws the same bytes. Another one may draw others, but as many.
"""

from __future__ import annotations

import io
import itertools
import random

from PIL import Image, ImageChops, ImageDraw, ImageFilter

WIDTH, HEIGHT = 1620, 936
FILE_BYTES = 122_620
SEED = 20_080_914
GRAIN = 20  # grey levels; it gives the file its size, as a photograph's detail does

SKY_TOP, SKY_LOW = (92, 140, 196), (246, 214, 178)
HILLS = (  # colour, height of the ridge from above, roughness
    ((122, 138, 170), 420, 90),
    ((96, 118, 134), 520, 110),
    ((66, 98, 92), 640, 120),
    ((40, 72, 58), 760, 110),
)

SEGMENT_BYTES_MAX = 65_533  # contents of a JPEG segment; its two length bytes count themselves
SEGMENT_OVERHEAD_BYTES = 4
COMMENT = b"\xff\xfe"


def draw() -> Image.Image:
    """Hills one behind the other under an evening sky."""
    chance = random.Random(SEED)  # noqa: S311  a picture, not a secret
    ramp = Image.linear_gradient("L").resize((WIDTH, HEIGHT))
    picture = Image.composite(Image.new("RGB", (WIDTH, HEIGHT), SKY_LOW), Image.new("RGB", (WIDTH, HEIGHT), SKY_TOP), ramp)
    pen = ImageDraw.Draw(picture)
    pen.ellipse((1130, 250, 1250, 370), fill=(255, 238, 204))
    picture = picture.filter(ImageFilter.GaussianBlur(3))
    pen = ImageDraw.Draw(picture)
    for colour, height, roughness in HILLS:
        ridge = _ridge(chance, height, roughness)
        pen.polygon([(0, HEIGHT), *ridge, (WIDTH, HEIGHT)], fill=colour)
    grain = Image.frombytes("L", (WIDTH // 2, HEIGHT // 2), bytes(value % GRAIN for value in chance.randbytes(WIDTH // 2 * (HEIGHT // 2))))
    return ImageChops.subtract(picture, grain.resize((WIDTH, HEIGHT)).convert("RGB"))


def _ridge(chance: random.Random, height: int, roughness: float) -> list[tuple[float, float]]:
    """A mountain ridge from left to right: the middle of each piece is moved by chance, less so in smaller pieces."""
    heights = [height + chance.uniform(-roughness, roughness) for _ in range(2)]
    while len(heights) < 65:
        roughness *= 0.55
        heights = [
            value for left, right in itertools.pairwise(heights) for value in (left, (left + right) / 2 + chance.uniform(-roughness, roughness))
        ] + heights[-1:]
    return [(index * WIDTH / (len(heights) - 1), value) for index, value in enumerate(heights)]


def encode(picture: Image.Image) -> bytes:
    """A JPEG of exactly FILE_BYTES: the best quality that fits, then comments up to the size."""
    low, high = 1, 95
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(len(_jpeg(picture, middle))) else (low, middle - 1)
    data = _jpeg(picture, low)
    assert _fits(len(data)), "a picture of this kind fits at the lowest quality"
    comments, missing = b"", FILE_BYTES - len(data)
    while missing:
        # What would be left after a full segment must hold a segment again, or nothing.
        size = min(missing, SEGMENT_OVERHEAD_BYTES + SEGMENT_BYTES_MAX)
        if 0 < missing - size < SEGMENT_OVERHEAD_BYTES:
            size -= SEGMENT_OVERHEAD_BYTES
        contents = size - SEGMENT_OVERHEAD_BYTES
        comments += COMMENT + (contents + 2).to_bytes(2, "big") + b" " * contents
        missing -= size
    return data[:2] + comments + data[2:]


def _fits(size: int) -> bool:
    return size == FILE_BYTES or size + SEGMENT_OVERHEAD_BYTES <= FILE_BYTES


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    output = io.BytesIO()
    picture.save(output, "JPEG", quality=quality, optimize=False, progressive=False)
    return output.getvalue()


def image() -> bytes:
    """The file that the image server serves as /image.jpg."""
    return encode(draw())
