"""Laws of SD3's position table: a new one is diffusers' own; past its end a longer one by interpolation is meant."""

import dataclasses

import jax
import numpy as np
import pytest
from sd3_twin import PLAIN, twin
from twins import apart, tensors_of

from lwd_jax.backbones import extend_backbone, sd3
from lwd_jax.weights.table import write

BUFFER = "pos_embed.pos_embed"


@pytest.mark.parametrize(
    "sizes",
    [{"sample_size": 128, "pos_embed_max_size": 192}, {"sample_size": 128, "pos_embed_max_size": 96}, {}],
    ids=["sd3-medium", "diffusers' default", "tiny"],
)
def test_a_new_models_table_is_diffusers_own_buffer(sizes):
    small = twin(num_layers=1, **sizes)
    buffer = tensors_of(small.foreign())[BUFFER]
    made = sd3.POSITIONS.to_foreign(sd3.position_table(small.config))
    assert made.shape == buffer.shape
    np.testing.assert_allclose(made, buffer, rtol=0, atol=1.2e-7)  # two roundings of one sine


def longer(torch, buffer, size: int):
    """A square table interpolated to `size` entries a side, the corners kept: [1 S^2 D] -> [1 size^2 D]."""
    side = round(buffer.shape[1] ** 0.5)
    picture = buffer.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    picture = torch.nn.functional.interpolate(picture, size=(size, size), mode="bilinear", align_corners=True)
    return picture.permute(0, 2, 3, 1).reshape(1, size * size, -1)


def test_past_the_tables_end_the_output_is_that_of_diffusers_with_a_longer_table():
    """13 x 11 tokens on a table of 10: diffusers refuses them, and takes them with a table of 13."""
    torch = pytest.importorskip("torch")
    model = PLAIN.foreign()
    params, given = PLAIN.params(model), PLAIN.inputs(batch=1, latent=(22, 26))
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        PLAIN.foreign_output(model, *given)

    large = twin(pos_embed_max_size=13).foreign()
    state = model.state_dict()
    large.load_state_dict(state | {BUFFER: longer(torch, state[BUFFER], 13)})
    made = jax.jit(PLAIN.module().apply)({"params": params}, *given)
    assert apart(np.asarray(made), PLAIN.foreign_output(large, *given)) <= 3e-5  # torch rounds the places too

    module, extended = extend_backbone(PLAIN.module(), params, 13 * 16)
    assert module.config == dataclasses.replace(PLAIN.config, pos_embed_max_size=13)
    table = dict(write(sd3.weights(module.config), extended))[BUFFER]
    np.testing.assert_allclose(table, tensors_of(large)[BUFFER], atol=1e-6)


def test_a_table_that_is_long_enough_stays():
    module, params = PLAIN.module(), {"position": {"table": sd3.position_table(PLAIN.config)}}
    assert extend_backbone(module, params, 10 * 16) == (module, params)
