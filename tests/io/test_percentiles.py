"""Percentiles that are counted are those of sorted pixels."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_reg.io import percentiles as module
from medseg_reg.io.percentiles import percentiles

Q = (0, 0.5, 1, 25, 49.9, 50, 73.123, 99, 99.5, 100)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count small arrays too, three slices at a time."""
    monkeypatch.setattr(module, "WHOLE", 0)
    monkeypatch.setattr(module, "BLOCK", 3 * 7 * 5)


def pixels(kind: str, dtype: str) -> np.ndarray:
    rng, shape = np.random.default_rng(0), (11, 7, 5)
    if kind == "constant":
        return np.full(shape, 3, dtype)
    if np.dtype(dtype).kind == "f":
        values = rng.normal(0, 10.0 ** rng.integers(-6, 7, shape))
        values[rng.random(shape) < 0.1] = 0.0
        return (np.round(values) if kind == "ties" else values).astype(dtype)
    bounds = np.iinfo(dtype)
    if kind == "ties":
        return rng.integers(0, 4, shape).astype(dtype)
    return rng.integers(bounds.min, bounds.max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("kind", ["wide", "ties", "constant"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "uint32", "float32"])
def test_they_are_numpys_to_the_last_digit(dtype, kind):
    image = pixels(kind, dtype)
    # Whole numbers are subtracted without the overflow that NumPy risks.
    expected = np.percentile(image if dtype == "float32" else image.astype(np.float64), Q)
    assert percentiles(image, Q) == tuple(float(v) for v in expected)
    assert percentiles(image[:1, :1, :1], (0, 30, 100)) == (float(image[0, 0, 0]),) * 3


def test_views_and_channels_are_read_in_any_order():
    image = pixels("wide", "float32")
    assert percentiles(image.transpose(2, 0, 1)[::-1], Q) == percentiles(image, Q)
    assert percentiles(np.stack([image, image], axis=-1), (50,))[0] == np.median(image)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "float32"])
def test_the_bytes_of_a_pixel_may_be_in_either_order(dtype):
    image = pixels("wide", dtype)
    for order in "<>":
        assert percentiles(image.astype(image.dtype.newbyteorder(order)), Q) == percentiles(
            image, Q
        )


def test_other_types_are_sorted():
    image = pixels("wide", "float64")
    assert percentiles(image, Q) == tuple(np.percentile(image, Q).tolist())


def test_no_second_volume_is_made():
    class Watched:
        shape, dtype, most = (60, 20, 20), np.dtype("float32"), 0

        def __len__(self):
            return 60

        def __getitem__(self, key):
            assert isinstance(key, slice)
            block = np.random.default_rng(key.start).random((60, 20, 20), np.float32)[key]
            self.most = max(self.most, len(block))
            return block

    watched = Watched()
    percentiles(watched, (1, 99))
    assert watched.most == 1
