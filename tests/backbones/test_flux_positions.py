"""Laws of FLUX's positions: NTK per axis and proportional attention, where diffusers has neither, and their records."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flux_twin import DEV, extend_foreign, foreign_model, foreign_output, params_of, random_inputs
from twins import apart

from lwd_jax.backbones import flux, load_backbone, save_backbone
from lwd_jax.nn.positions import frequencies, grid_rotation, rotate

STRETCHED = dataclasses.replace(DEV, ntk=(10.0, 3.0), proportional_attention=True)
TOKENS = 7 + 3 * 9


def output(config, params, given):
    return np.asarray(jax.jit(flux.FLUX(config).apply)({"params": params}, *given))


def test_output_is_that_of_diffusers_told_the_same(monkeypatch):
    """Both at once; each alone is seen in the output."""
    model, given = foreign_model(DEV), random_inputs(DEV, 6, 18)
    params, found = params_of(DEV, model), [foreign_output(model, *given)]
    for config in (dataclasses.replace(STRETCHED, proportional_attention=False), STRETCHED):
        extend_foreign(monkeypatch, model, config, TOKENS)
        found.append(foreign_output(model, *given))
    assert min(apart(found[1], found[0]), apart(found[2], found[1])) > 1e-3
    assert apart(output(STRETCHED, params, given), found[2]) <= 1e-5


@pytest.mark.parametrize(("px", "factor"), [(1024, 1.0), (2048, 1.074), (4096, 1.147)])
def test_softmax_scale(px, factor):
    """FACTS: sqrt(log_4608(L) / d) relative to 1 / sqrt(d)."""
    tokens = flux.TEXT_TOKENS + (px // 16) ** 2
    assert flux.logit_scale(STRETCHED, tokens) == pytest.approx(factor, abs=5e-4)
    assert flux.logit_scale(DEV, tokens) == 1.0


def test_angles_are_positions_times_frequencies():
    """Closed form, and the product of a query and a key depends on how far apart they stand."""
    axes, thetas = (4, 4, 8), (1e4, 1e5, 3e4)
    rotation = grid_rotation(5, 3, axes, thetas)
    row, column = 4, 2
    angles = [0, 0, *(row * 1e5 ** (-i / 2) for i in range(2)), *(column * 3e4 ** (-i / 4) for i in range(4))]
    np.testing.assert_allclose(rotation.cos[0, row * 3 + column], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(rotation.sin[0, row * 3 + column], np.sin(angles), atol=1e-6)
    q, k = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    q, k = (np.asarray(rotate(np.broadcast_to(x, (1, 15, 1, 16)), rotation))[0, :, 0].reshape(5, 3, 16) for x in (q, k))
    np.testing.assert_allclose(q[3, 1] @ k[1, 0], q[4, 2] @ k[2, 1], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(q, axis=-1), np.linalg.norm(q[0, 0]), rtol=1e-5)


def test_ntk_stretches_the_longest_wave_by_nearly_its_factor():
    """theta^((d - 2) / d): at d = 56, ten times the base makes the longest wave 9.2 times as long."""
    plain, stretched = frequencies(56, 1e4), frequencies(56, 1e5)
    assert plain[0] == stretched[0] == 1
    assert plain[-1] / stretched[-1] == pytest.approx(10 ** (54 / 56))


def test_folders_keep_what_diffusers_cannot_say(tmp_path):
    """Under a key that diffusers skips without a word; a plain model's config.json has no such key."""
    params = params_of(DEV, foreign_model(DEV))
    for config in (DEV, STRETCHED):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_backbone(folder, flux.FLUX(config), params)
        assert load_backbone(folder)[0].config == config
        assert ("_lwd" in json.loads((folder / "config.json").read_text())) == (config is STRETCHED)


def test_diffusers_reads_such_a_folder_without_complaint(tmp_path, caplog):
    diffusers = pytest.importorskip("diffusers")
    logging = diffusers.utils.logging

    save_backbone(tmp_path / "transformer", flux.FLUX(STRETCHED), params_of(DEV, foreign_model(DEV)))
    logging.enable_propagation()
    try:
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    finally:
        logging.disable_propagation()
    assert "_lwd" not in caplog.text and "not expected" not in caplog.text
