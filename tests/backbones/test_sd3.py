"""Laws of SD3 alone; those of every backbone are in test_backbones.py."""

import math

import jax
import numpy as np
import pytest
from jaxprs import shapes, traced
from sd3_twin import PLAIN, twin
from twins import apart

from lwd_jax.backbones import sd3
from lwd_jax.errors import UserError
from lwd_jax.weights.model import init_params
from lwd_jax.weights.table import write


def test_the_last_blocks_text_asks_nothing():
    """It has no way out, so only picture tokens attend there: the one place of fewer queries than keys."""
    single = twin(num_layers=1)
    given = single.inputs()
    found = traced(lambda p: single.module().apply({"params": p}, *given), single.abstract())
    picture, both = 36, 36 + given[2].tokens.shape[1]
    logits = {shape[-2:] for shape in shapes(found) if shape[-1:] == (both,)}
    assert (picture, both) in logits and (both, both) not in logits


def test_how_a_new_model_is_drawn():
    config = PLAIN.config
    blocks = init_params(sd3.BACKBONE, config, jax.random.key(0))["joint_blocks"]["picture"]
    assert blocks["q"]["kernel"].shape == (3, config.width, config.width)
    bound = math.sqrt(6 / (2 * config.width))  # Glorot and Bengio 2010, eq. 16
    np.testing.assert_allclose(np.std(blocks["q"]["kernel"]), bound / math.sqrt(3), rtol=0.05)
    assert not np.any(blocks["modulation"]["kernel"])


def test_a_checkpoints_own_position_table_is_used_and_kept():
    """Another table of one part per column and row, in half precision as releases are: used and written as it was."""
    torch = pytest.importorskip("torch")
    model, config = PLAIN.foreign(), PLAIN.config
    size, half = config.pos_embed_max_size, config.width // 2
    rng = np.random.default_rng(3)
    columns, rows = rng.standard_normal((2, size, half)).astype(np.float16).astype(np.float32)
    places = (size, size, half)
    own = np.concatenate([np.broadcast_to(columns[None], places), np.broadcast_to(rows[:, None], places)], axis=-1)
    own = own.reshape(1, size * size, 2 * half)
    model.pos_embed.pos_embed.copy_(torch.from_numpy(own))
    params, given = PLAIN.params(model), PLAIN.inputs()
    assert apart(PLAIN.output(params, *given), PLAIN.foreign_output(model, *given)) <= 1e-5
    np.testing.assert_array_equal(dict(write(PLAIN.rows, params))["pos_embed.pos_embed"], own)


def test_a_position_table_of_another_kind_is_refused():
    rng = np.random.default_rng(4)
    with pytest.raises(UserError, match="pos_embed.pos_embed"):
        sd3.POSITIONS.to_ours(rng.standard_normal((1, 36, 8)))
