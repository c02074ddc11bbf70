"""What a backbone is told while it is sampled, against the formula written out."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_models import FLUX, SD3, Formula, quiet

from lwd_jax import config as configs
from lwd_jax.config import Sampling
from lwd_jax.nn.conditioning import Conditioning
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.report.samples import Request, _latents


@pytest.mark.parametrize("sizes, told", [(FLUX, np.full(2, 2.5, np.float32)), (SD3, None)], ids=["flux", "sd3"])
def test_both_halves_of_a_guided_prediction_are_told_the_embedded_guidance(sizes, told):
    """One step of Euler from noise to data takes the whole velocity off; SD3 is told none."""
    random, module = np.random.default_rng(0), Formula(sizes)
    tokens, pooled, noise = (
        random.standard_normal(shape).astype(np.float32) for shape in ((3, 9, 24), (3, 16), (2, 4, 4, 4))
    )
    cond, null = (Conditioning(tokens[rows], np.ones((3, 9))[rows], pooled[rows]) for rows in (slice(2), slice(2, 3)))
    request = Request(("a", "b"), 32, 32, Sampling(steps=1, guidance=2.0, embedded_guidance=2.5), batch=2, noise=noise)
    models = SimpleNamespace(backbone=lambda **kinds: (module, {}))
    z0 = _latents(models, request, cond, null, make_mesh(configs.Mesh(fsdp=1), jax.devices()[:1]), quiet)
    of_prompt, of_null = (module.apply({}, noise, np.ones(2), part._replace(guidance=told)) for part in (cond, null))
    np.testing.assert_allclose(z0, noise - (of_null + 2.0 * (of_prompt - of_null)), rtol=1e-5, atol=1e-5)
