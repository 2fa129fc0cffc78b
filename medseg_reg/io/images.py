"""Photographs, video frames and single slices: PNG, JPEG, TIFF, npy and npz to arrays.

Every array is (rows, columns) or (rows, columns, 3), so a picture that is 60 wide and 40 high
is (40, 60). Nothing is guessed in silence: what could be read in two ways is refused with the
way out -- transparency, an EXIF rotation, several pages, 16-bit colour.
"""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from medseg_reg.errors import MedsegError
from medseg_reg.files import replacing
from medseg_reg.io.threads import THREADS

Array = np.ndarray[Any, np.dtype[Any]]
Color = Literal["gray", "rgb", "auto"]
_Result = TypeVar("_Result")

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
ARRAYS = (".npy", ".npz")
IMAGE_KEYS = ("image", "img", "hu")
MASK_KEYS = ("mask", "label")
MAX_PIXELS = 80_000_000
MAX_BYTES = 1 << 30

_FORMATS = ("PNG", "JPEG", "TIFF")
_GRAY_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "I", "F")


def read_image(path: Path, color: Color = "gray") -> Array:
    """Read one image.

    Args:
        path: a PNG, JPEG, TIFF, npy or npz file; an npz holds it as `image`, `img` or `hu`.
        color: `gray` makes one channel, colour by luma = 0.299 R + 0.587 G + 0.114 B (ITU-R
            BT.601); `rgb` makes three, gray repeated; `auto` gives gray for a colour file whose
            three channels are all equal, else what the file has.

    Returns:
        (H, W) or (H, W, 3). 8-bit files give uint8; integers of more bits give int16 if their
        values fit, else float32; floating-point files give float32.

    Raises:
        MedsegError: the file is damaged, too large, or of a kind that is refused.
    """
    if path.suffix.lower() in ARRAYS:
        pixels = _read_array(path, IMAGE_KEYS)
    else:
        pixels = _with_picture(path, lambda picture: _pixels(picture, path))
    return _apply_color(_store_dtype(pixels, path), color)


def read_labels(path: Path) -> Array:
    """Read the gray values of a mask as they stand in the file: (H, W), an integer type.

    A colour file is a mask if its three channels are equal. A palette file gives its gray
    values if the palette is gray, else the palette's indices, as in VOC annotations. An npz
    holds it as `mask` or `label`.

    Raises:
        MedsegError: the file is damaged, too large, coloured, or not of integers.
    """
    if path.suffix.lower() in ARRAYS:
        values = _read_array(path, MASK_KEYS)
    else:
        values = _with_picture(path, lambda picture: _label_pixels(picture, path))
    if values.ndim == 3:
        if not _equal_channels(values):
            raise MedsegError(
                f"{path}: is a mask in colour. Convert it to gray values, one for each class."
            )
        values = values[..., 0]
    if values.dtype.kind == "b":
        values = values.astype(np.uint8)
    if values.dtype.kind == "f" and np.array_equal(values, np.rint(values)):
        values = values.astype(np.int64)
    if values.dtype.kind not in "iu":
        raise MedsegError(f"{path}: a mask holds whole numbers, this one holds {values.dtype}.")
    return values


def image_shape(path: Path) -> tuple[int, int]:
    """Return (rows, columns) of an image from its header, without decoding it."""
    if path.suffix.lower() in ARRAYS:
        rows, columns = _array_header(path, IMAGE_KEYS)[0][:2]
        return rows, columns
    return _with_picture(path, lambda picture: (picture.height, picture.width))


def is_colour(path: Path) -> bool:
    """Whether an image has three channels that differ somewhere."""
    if path.suffix.lower() not in ARRAYS and _with_picture(path, lambda p: p.mode in _GRAY_MODES):
        return False
    return read_image(path, "auto").ndim == 3


def resolve_color(paths: Iterable[Path], color: Color) -> Literal["gray", "rgb"]:
    """Settle `auto` for a whole data set: `rgb` as soon as one image is in colour."""
    if color != "auto":
        return color
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(is_colour, paths)
        try:
            # Not `in_threads`: the first image in colour settles it.
            return "rgb" if any(found) else "gray"
        finally:
            pool.shutdown(cancel_futures=True)


def npz_keys(path: Path) -> tuple[str, ...]:
    """Return the names of the arrays of an npz file."""
    with _decoding(path), zipfile.ZipFile(path) as archive:
        return tuple(name.removesuffix(".npy") for name in archive.namelist())


def write_mask_png(path: Path, mask: Array) -> None:
    """Write a mask of class indices as an 8-bit gray PNG, whole or not at all.

    Args:
        path: ends in .png.
        mask: (H, W), integers or bool, values 0 to 255, written as they are.
    """
    if mask.ndim != 2 or mask.dtype.kind not in "biu" or mask.min() < 0 or mask.max() > 255:
        raise ValueError(
            f"a mask is (H, W) with values 0 to 255, this is {mask.shape} {mask.dtype}"
        )
    with replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(mask, np.uint8)).save(temporary, format="PNG")


def _with_picture(path: Path, use: Callable[[Image.Image], _Result]) -> _Result:
    """Open a picture, check its header, and hand it to `use`."""
    with _decoding(path), Image.open(path, formats=_FORMATS) as picture:
        _check_header(picture, path)
        return use(picture)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn whatever a decoder throws into one error that names the file."""
    try:
        yield
    except (MedsegError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(path, "its pixels") from None
    except OSError as error:
        # A missing or unreadable file has a number; a decoder's complaint has none, and
        # damaged offsets make seeks that are invalid.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise _damaged(path, error) from None
    except Exception as error:
        # On bad bytes Pillow, zipfile and NumPy raise SyntaxError, struct.error, zlib.error,
        # TokenError and many more.
        raise _damaged(path, error) from None


def _check_header(picture: Image.Image, path: Path) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise _too_large(path, f"{picture.width} x {picture.height} pixels")
    if (pages := getattr(picture, "n_frames", 1)) > 1:
        raise MedsegError(f"{path}: has {pages} pages. Save each page as a file of its own.")
    tiles = getattr(picture, "tile", [])
    rawmode = str(tiles[0].args) if tiles else ""
    if picture.mode in ("RGB", "RGBA", "LA") and "16" in rawmode:
        raise MedsegError(
            f"{path}: is {picture.mode} with 16 bits a channel. Save it with 8 bits a channel, or "
            "as 16-bit gray."
        )
    # Before decoding: Pillow turns a TIFF upright by itself when it is decoded.
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1)
    if turned not in (0, 1):
        raise MedsegError(
            f"{path}: carries the EXIF orientation {turned}, and nothing says whether its mask is "
            "turned as well. Save image and mask upright, without this tag."
        )


def _pixels(picture: Image.Image, path: Path) -> Array:
    if picture.mode == "P" or picture.mode == "PA":
        transparent = "transparency" in picture.info or picture.mode == "PA"
        picture = picture.convert("RGBA" if transparent else "RGB")
    if picture.mode in ("RGBA", "LA"):
        if np.asarray(picture.getchannel("A")).min() < 255:
            raise MedsegError(
                f"{path}: has transparent pixels, whose value is not defined. Save it without "
                "an alpha channel."
            )
        picture = picture.convert("RGB" if picture.mode == "RGBA" else "L")
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode != "RGB" and picture.mode not in _GRAY_MODES:
        raise MedsegError(f"{path}: is of the colour mode {picture.mode}. Save it as gray or RGB.")
    return np.array(picture)


def _label_pixels(picture: Image.Image, path: Path) -> Array:
    if picture.mode != "P":
        return _pixels(picture, path)
    indices = np.array(picture)
    palette = np.asarray(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
    if not _equal_channels(palette[None]):
        return indices
    table = np.zeros(256, np.uint8)
    table[: len(palette)] = palette[:, 0]
    grays: Array = table[indices]
    return grays


def _store_dtype(pixels: Array, path: Path) -> Array:
    """Bring pixels to uint8, int16 or float32 without changing a value beyond rounding."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind == "f":
        return pixels.astype(np.float32)
    if pixels.dtype.kind not in "iu":
        raise MedsegError(f"{path}: holds {pixels.dtype}, an image holds numbers.")
    low, high = int(pixels.min()), int(pixels.max())
    if low >= -(1 << 15) and high < 1 << 15:
        return pixels.astype(np.int16)
    if max(-low, high) > 1 << 24:
        raise MedsegError(
            f"{path}: values from {low} to {high} fit neither int16 nor float32. Rescale it."
        )
    return pixels.astype(np.float32)


def _apply_color(pixels: Array, color: Color) -> Array:
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2) if color == "rgb" else pixels
    if color == "rgb":
        return pixels
    if _equal_channels(pixels):
        return np.ascontiguousarray(pixels[..., 0])
    return pixels if color == "auto" else luma(pixels)


def luma(pixels: Array) -> Array:
    """Return the gray of a colour image, 0.299 R + 0.587 G + 0.114 B, in the same type.

    Shapes: (..., 3) to (...). 8-bit images are rounded as Pillow does it, in fixed point.
    """
    if pixels.dtype == np.uint8 and pixels.ndim == 3:
        return np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))
    gray: Array = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    if pixels.dtype.kind in "iu":
        gray = np.rint(gray)
    return gray.astype(pixels.dtype)


def _equal_channels(pixels: Array) -> bool:
    first = pixels[..., 0]
    return bool((first == pixels[..., 1]).all() and (first == pixels[..., 2]).all())


def _read_array(path: Path, keys: tuple[str, ...]) -> Array:
    """Read an npy file, or the one array of an npz file that has one of the names."""
    shape, dtype, name = _array_header(path, keys)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size > MAX_BYTES:
        raise _too_large(path, f"{shape} {dtype}")
    with _decoding(path):
        if name is None:
            return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
        with zipfile.ZipFile(path) as archive:
            # The header of a hostile file may promise more than the file holds.
            if archive.getinfo(name).file_size < size:
                raise ValueError("it is shorter than its header says")
            with archive.open(name) as file:
                return np.array(np.lib.format.read_array(file, allow_pickle=False))


def _array_header(
    path: Path, keys: tuple[str, ...]
) -> tuple[tuple[int, ...], np.dtype[Any], str | None]:
    """Return shape, type and, in an npz, the member's name; refuse objects (pickles)."""
    name = None
    with _decoding(path):
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                shape, dtype = _npy_header(file)
        else:
            with zipfile.ZipFile(path) as archive:
                found = [key for key in keys if f"{key}.npy" in archive.namelist()]
                if len(found) != 1:
                    raise MedsegError(
                        f"{path}: holds {', '.join(npz_keys(path)) or 'nothing'}; expected one of "
                        f"{', '.join(keys)}."
                    )
                name = f"{found[0]}.npy"
                with archive.open(name) as file:
                    shape, dtype = _npy_header(file)
    if dtype.kind not in "biuf":
        raise MedsegError(f"{path}: holds {dtype}, not numbers. Save plain arrays of numbers.")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 3) or 0 in shape:
        raise MedsegError(f"{path}: is {shape}; expected (rows, columns) or (rows, columns, 3).")
    return shape, dtype, name


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"npy version {version} is not supported")
    shape, _, dtype = read(file)
    return shape, dtype


def _damaged(path: Path, error: Exception) -> MedsegError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "its content is no PNG, JPEG or TIFF"
    return MedsegError(f"{path}: cannot be read ({reason}). Get the file again.")


def _too_large(path: Path, found: str) -> MedsegError:
    return MedsegError(
        f"{path}: {found} are more than the {MAX_PIXELS // 10**6} million that are read. Cut it "
        "into tiles or scale it down."
    )
