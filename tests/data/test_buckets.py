"""Laws of aspect buckets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwd_jax.data.buckets import assign, magnification, multiple, sizes
from lwd_jax.errors import UserError


@pytest.mark.parametrize("resolution", [64, 96, 128, 256, 512, 1024, 2048, 4096])
def test_sizes_divide_and_have_about_the_area(resolution):
    found = sizes(resolution, keep_aspect=True)
    assert (resolution, resolution) in found and len(found) == len(set(found))
    assert set(found) == {(w, h) for h, w in found}  # tall and wide are treated alike
    for height, width in found:
        assert height % multiple(resolution) == 0 == width % multiple(resolution)
        if resolution >= 256:
            assert 0.85 < height * width / resolution**2 < 1.15
    assert sizes(resolution, keep_aspect=False) == [(resolution, resolution)]


@pytest.mark.parametrize("resolution, keep_aspect", [(1000, True), (544, True), (80, True), (72, False), (0, False)])
def test_a_resolution_that_does_not_divide_is_refused(resolution, keep_aspect):
    with pytest.raises(UserError, match="does not divide"):
        sizes(resolution, keep_aspect)


@given(st.lists(st.tuples(st.integers(16, 9000), st.integers(16, 9000)), min_size=1, max_size=40), st.integers(1, 12))
def test_assignment(shapes, minimum):
    heights, widths = np.array(shapes).T
    free, table = assign(heights, widths, 1024, True)
    aspects = np.log([w / h for h, w in table])
    wanted = np.log(widths / heights)
    assert np.allclose(np.abs(aspects[free] - wanted), np.abs(aspects[None] - wanted[:, None]).min(1))
    merged, _ = assign(heights, widths, 1024, True, minimum)
    counts = np.bincount(merged)
    assert counts.sum() == len(shapes)
    assert len(counts[counts > 0]) == 1 or counts[counts > 0].min() >= minimum
    # A bucket that was large enough stays where it is.
    large = [b for b in np.unique(free) if np.sum(free == b) >= minimum]
    assert all((merged[free == b] == b).all() for b in large)


def test_magnification():
    assert magnification(100, 50, (200, 100)) == 2 and magnification(100, 400, (50, 100)) == 0.5
