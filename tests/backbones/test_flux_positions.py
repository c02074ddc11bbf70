"""Laws of FLUX's positions: NTK per axis and proportional attention, where diffusers has neither, and their records."""

import json

import flux_twin
import jax
import numpy as np
import pytest
from flux_twin import DEV, extend_foreign
from twins import apart

from lwd_jax.backbones import flux, load_backbone, save_backbone
from lwd_jax.nn.positions import frequencies, grid_rotation, rotate

STRETCHED = flux_twin.twin(ntk=(10.0, 3.0), proportional_attention=True)
NTK_ALONE = flux_twin.twin(ntk=(10.0, 3.0))
TOKENS = 7 + 3 * 9


def test_output_is_that_of_diffusers_told_the_same(monkeypatch):
    """Both at once; each alone is seen in the output."""
    model, given = DEV.foreign(), DEV.inputs(latent=(6, 18))
    params, found = DEV.params(model), [DEV.foreign_output(model, *given)]
    for twin in (NTK_ALONE, STRETCHED):
        extend_foreign(monkeypatch, model, twin.config, TOKENS)
        found.append(DEV.foreign_output(model, *given))
    assert min(apart(found[1], found[0]), apart(found[2], found[1])) > 1e-3
    made = jax.jit(STRETCHED.module().apply)({"params": params}, *given)
    assert apart(np.asarray(made), found[2]) <= 1e-5


@pytest.mark.parametrize(("px", "factor"), [(1024, 1.0), (2048, 1.074), (4096, 1.147)])
def test_softmax_scale(px, factor):
    """FACTS: sqrt(log_4608(L) / d) relative to 1 / sqrt(d)."""
    tokens = flux.TEXT_TOKENS + (px // 16) ** 2
    assert flux.logit_scale(STRETCHED.config, tokens) == pytest.approx(factor, abs=5e-4)
    assert flux.logit_scale(DEV.config, tokens) == 1.0


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
    params = DEV.params(DEV.foreign())
    for twin in (DEV, STRETCHED):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_backbone(folder, twin.module(), params)
        assert load_backbone(folder)[0].config == twin.config
        assert ("_lwd" in json.loads((folder / "config.json").read_text())) == (twin is STRETCHED)


def test_diffusers_reads_such_a_folder_without_complaint(tmp_path, caplog):
    diffusers = pytest.importorskip("diffusers")
    logging = diffusers.utils.logging

    save_backbone(tmp_path / "transformer", STRETCHED.module(), DEV.params(DEV.foreign()))
    logging.enable_propagation()
    try:
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    finally:
        logging.disable_propagation()
    assert "_lwd" not in caplog.text and "not expected" not in caplog.text
