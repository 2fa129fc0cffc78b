"""The contact sheet of a slice store: a person sees in a second whether masks fit images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from medseg_reg.data.store import SliceStore
from medseg_reg.files import replacing

Array = np.ndarray[Any, np.dtype[Any]]

TILE = 192
COLUMNS = 6
MAX_TILES = 48
IGNORED = (160, 160, 160)
OUTLINES = ((255, 64, 64), (64, 200, 255), (120, 255, 120), (255, 200, 40), (230, 120, 255))


def write_overview(store: SliceStore, path: Path) -> None:
    """Draw one slice of each case, the one with most foreground, with the outline of its mask.

    More than 48 cases are thinned out evenly.
    """
    rows = store.manifest.cases
    chosen = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, MAX_TILES).astype(int))]
    columns = min(COLUMNS, len(chosen))
    sheet = Image.new("RGB", (columns * TILE, -(-len(chosen) // columns) * TILE))
    for index, row in enumerate(chosen):
        number = int(np.argmax(row.foreground)) if any(row.foreground) else row.slices // 2
        image, mask = store.image(row.name)[number], store.mask(row.name)[number]
        tile = draw_slice(image, mask, TILE, store.ignore_label)
        ImageDraw.Draw(tile).text((3, 2), f"{row.name} #{number}", fill=(255, 255, 0))
        sheet.paste(tile, (index % columns * TILE, index // columns * TILE))
    with replacing(path) as temporary:
        sheet.save(temporary)


def draw_slice(image: Array, mask: Array, size: int, ignored: int | None = None) -> Image.Image:
    """Return one slice as a square picture of `size` pixels with the mask's outlines on it.

    Three channels are drawn as colours; of any other number, the first is drawn. The outline of
    pixels with the ignored label is gray.
    """
    if image.ndim == 3 and image.shape[2] != 3:
        image = image[..., 0]
    picture = Image.fromarray(_to_8_bits(image)).convert("RGB")
    scale = size / max(picture.size)
    shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(shape, Image.Resampling.BILINEAR)
    labels = np.asarray(Image.fromarray(mask).resize(shape, Image.Resampling.NEAREST))
    pixels = np.array(picture)
    for value in np.unique(labels[labels > 0]):
        colour = IGNORED if value == ignored else OUTLINES[(int(value) - 1) % len(OUTLINES)]
        pixels[outline(labels == value)] = colour
    tile = Image.new("RGB", (size, size))
    tile.paste(Image.fromarray(pixels), ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return tile


def outline(region: Array) -> Array:
    """Return the pixels of a region that touch its outside by an edge."""
    padded = np.pad(region, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: Array = region & ~inner
    return edge


def _to_8_bits(image: Array) -> Array:
    """Scale an image to 8 bits; HU by a window on soft tissue, other data by percentiles.

    Colours are scaled together, so that they keep their hue, and are never taken for HU.
    """
    if image.dtype == np.uint8:
        return image
    values = image.astype(np.float32)
    low, high = (-160.0, 240.0)
    if image.dtype != np.int16 or image.ndim == 3 or values.min() >= -100:
        low, high = (float(v) for v in np.percentile(values, (1, 99)))
    scaled: Array = (values - low) / max(high - low, 1e-6)
    return (np.clip(scaled, 0, 1) * 255).astype(np.uint8)
