"""Laws of FLUX alone; those of every backbone are in test_backbones.py."""

import jax
import numpy as np
import pytest
from flux_twin import DEV, SCHNELL
from twins import apart


@pytest.mark.parametrize("remat", ["full", pytest.param("attention", marks=pytest.mark.heavy)])
def test_remat_changes_nothing(remat):
    """Gradients under jit at local batch 1; test_sd3_remat.py says why there."""
    params = DEV.params(DEV.foreign())
    given = DEV.inputs(batch=1)
    plain, again = (DEV.compiled(name)(params, *given, given[0]) for name in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max()), again, plain)


def test_guidance_is_heard():
    params = DEV.params(DEV.foreign())
    z_t, t, cond = DEV.inputs()
    louder = cond._replace(guidance=cond.guidance + 0.5)
    assert apart(DEV.output(params, z_t, t, louder), DEV.output(params, z_t, t, cond)) > 1e-3


def test_shapes_of_the_stacks():
    width, params = DEV.config.width, DEV.abstract()
    assert params["double_blocks"]["picture"]["q"]["kernel"].shape == (2, width, width)
    assert params["single_blocks"]["down"]["kernel"].shape == (3, 5 * width, width)


@pytest.mark.parametrize(
    ("twin", "guidance", "said"),
    [
        (DEV, None, "is told a guidance scale, but cond.guidance is None"),
        (SCHNELL, np.ones(2, np.float32), "is not told a guidance scale"),
    ],
)
def test_guidance_that_does_not_fit_is_refused(twin, guidance, said):
    z_t, t, cond = twin.inputs()
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(twin.module().apply, {"params": twin.abstract()}, z_t, t, cond._replace(guidance=guidance))
