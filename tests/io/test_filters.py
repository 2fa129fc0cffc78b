"""Erosion and Canny edges, checked against SciPy and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medseg_reg.errors import MedsegError
from medseg_reg.io.filters import prepared, preprocess, to_8_bits


@pytest.fixture
def image() -> np.ndarray:
    rng = np.random.default_rng(0)
    picture = rng.integers(20, 40, (40, 60), np.uint8)
    picture[10:30, 15:45] = 200
    return picture


def test_without_settings_the_image_is_a_copy(image):
    result = preprocess(image, None, None)
    np.testing.assert_array_equal(result, image)
    result[:] = 0
    assert image.any()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_erosion_is_the_minimum_in_a_square(image, size):
    before = image.copy()
    expected = ndimage.minimum_filter(image, size=size, mode="constant", cval=255)
    np.testing.assert_array_equal(preprocess(image, size, None), expected)
    np.testing.assert_array_equal(image, before)


def test_edges_lie_on_the_outline_and_nowhere_else(image):
    edges = preprocess(image, None, (100, 300)) == 255
    outline = np.zeros_like(edges)
    outline[8:32, 13:47] = True
    outline[12:28, 17:43] = False
    assert not (edges & ~outline).any()
    assert edges.sum() >= 2 * (18 + 28)


def test_pixels_beside_edges_stay(image):
    result = preprocess(image, None, (100, 300))
    changed = result != image
    assert (result[changed] == 255).all()
    assert 0 < changed.mean() < 0.1


def test_edges_are_those_of_the_eroded_image(image):
    both = preprocess(image, 5, (100, 300))
    np.testing.assert_array_equal(both, preprocess(preprocess(image, 5, None), None, (100, 300)))


def test_colour_takes_white_edges(image):
    rgb = np.dstack([image] * 3)
    result = preprocess(rgb, 3, (100, 300))
    assert result.shape == rgb.shape
    np.testing.assert_array_equal(result[..., 0], preprocess(image, 3, (100, 300)))
    np.testing.assert_array_equal(result[..., 0], result[..., 2])


def test_a_view_that_is_not_contiguous_is_taken(image):
    np.testing.assert_array_equal(
        preprocess(image[::2, ::-1], 3, (50, 90)), preprocess(image[::2, ::-1].copy(), 3, (50, 90))
    )


@pytest.mark.parametrize(
    ("erosion", "canny"), [(0, None), (-3, None), (100, None), (None, (9, 3)), (None, (-1, 3))]
)
def test_settings_out_of_range_are_refused(image, erosion, canny):
    with pytest.raises(MedsegError, match="expected"):
        preprocess(image, erosion, canny)


def test_other_types_are_refused(image):
    with pytest.raises(TypeError, match="8-bit"):
        preprocess(image.astype(np.int16), 3, None)


@pytest.fixture
def colours() -> np.ndarray:
    """Two pictures (2, H, W, 3) whose channels have edges at different places."""
    stack = np.random.default_rng(1).integers(20, 40, (2, 40, 60, 3), np.uint8)
    for channel in range(3):
        stack[:, 5 + 8 * channel : 20 + 8 * channel, 10:40, channel] = 220
    return stack


@pytest.mark.parametrize(("erosion", "canny"), [(3, None), (None, (50, 150)), (3, (50, 150))])
def test_a_stack_of_colour_pictures_is_filtered_picture_by_picture(colours, erosion, canny):
    expected = np.stack([preprocess(one, erosion, canny) for one in colours])
    np.testing.assert_array_equal(prepared(colours, erosion, canny, is_hu=False), expected)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_numbers_of_channels_are_filtered_one_by_one(colours, channels):
    stack = np.concatenate([colours, colours], axis=-1)[..., :channels]
    result = prepared(stack, 3, (50, 150), is_hu=False)
    assert result.shape == stack.shape
    for index in range(channels):
        alone = prepared(stack[..., index], 3, (50, 150), is_hu=False)
        np.testing.assert_array_equal(result[..., index], alone)


def test_three_sequences_of_more_bits_are_no_colours(colours):
    deep = colours.astype(np.int16) * 9
    eight = to_8_bits(deep, is_hu=False)
    result = prepared(deep, None, (50, 150), is_hu=False)
    for index in range(3):
        expected = np.stack([preprocess(one, None, (50, 150)) for one in eight[..., index]])
        np.testing.assert_array_equal(result[..., index], expected)
