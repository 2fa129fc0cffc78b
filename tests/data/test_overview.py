"""The contact sheet draws slices of any number of channels and any type."""

from __future__ import annotations

import numpy as np
import pytest

from medseg_reg.data.overview import draw_slice
from tests.stores import make_store

RAMP = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
EMPTY = np.zeros((32, 32), np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_of_channels_that_are_no_colours_the_first_is_drawn(channels, dtype):
    image = np.zeros((32, 32, channels), dtype)
    image[..., 0] = RAMP
    picture = np.asarray(draw_slice(image, EMPTY, 32))
    np.testing.assert_array_equal(picture, np.asarray(draw_slice(image[..., 0], EMPTY, 32)))
    assert np.ptp(picture) > 200


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"),
    [("uint8", 1, 0), ("int16", 100, -12000), ("int16", 20, 0), ("float32", 1 / 255, 0)],
)
def test_colours_keep_their_hue_and_are_no_hu(dtype, scale, offset):
    colours = np.stack([RAMP, RAMP // 2, RAMP * 0], axis=-1).astype(float)
    image = (colours * scale + offset).astype(dtype)
    picture = np.asarray(draw_slice(image, EMPTY, 32)).astype(int)
    np.testing.assert_allclose(picture[..., 0], RAMP, atol=14)
    np.testing.assert_allclose(picture[..., 1], RAMP // 2, atol=14)
    assert picture[..., 2].max() == 0


@pytest.mark.parametrize("channels", [2, 5])
def test_a_store_of_many_channels_is_published(tmp_path, channels):
    store = make_store(tmp_path / "store", cases=2, channels=channels, dtype="float32")
    assert (store.path / "overview.png").stat().st_size > 0
