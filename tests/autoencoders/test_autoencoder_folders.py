"""Laws: what is saved loads in diffusers, whole and with the same output, and back; the rest is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwd_jax.autoencoders import kl, load_autoencoder, save_autoencoder
from lwd_jax.errors import UserError
from lwd_jax.weights.folder import fingerprint
from lwd_jax.weights.model import abstract_params, init_params
from lwd_jax.weights.table import flat

CONFIG = kl.Config(4, (8, 16), 1, 4, use_quant_conv=True, use_post_quant_conv=True, scaling=0.5, shift=0.1)


@pytest.fixture(scope="module")
def params():
    return init_params(kl.AUTOENCODER, CONFIG, jax.random.key(3))


@pytest.fixture
def saved(params, tmp_path):
    save_autoencoder(tmp_path / "vae", kl.AutoencoderKL(CONFIG), params)
    return tmp_path / "vae"


def test_init_is_random_everywhere(params):
    """No two kernels of one shape are alike, and their spread is that of the initialiser."""
    kernels = [np.asarray(leaf) for path, leaf in flat(params).items() if path.endswith("kernel")]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)
    wide = [kernel for kernel in kernels if kernel.size > 2000]
    for kernel in wide:
        assert abs(kernel.std() * np.sqrt(np.prod(kernel.shape[:-1])) - 1) < 0.1


def test_saved_and_loaded(saved, params):
    module, loaded = load_autoencoder(saved)
    assert module == kl.AutoencoderKL(CONFIG)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_saved_folder_loads_in_diffusers(saved, params):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    twin, info = diffusers.AutoencoderKL.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    assert twin.config.scaling_factor == 0.5 and twin.config.shift_factor == 0.1
    z = np.random.default_rng(0).standard_normal((1, 3, 5, 4)).astype(np.float32)
    with torch.no_grad():
        theirs = twin.decode(torch.tensor(z.transpose(0, 3, 1, 2).copy())).sample.numpy().transpose(0, 2, 3, 1)
    ours = jax.jit(lambda p, z: kl.AutoencoderKL(CONFIG).apply({"params": p}, z, method="decode"))(params, z)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("variant", kl.VARIANTS)
def test_every_shift_is_written_as_a_number(variant):
    """The pipelines of SD3 and FLUX add it to latents, whatever it is."""
    config = kl.VARIANTS[variant]
    assert type(kl.to_foreign(config)["shift_factor"]) is float
    assert kl.from_foreign(kl.to_foreign(config)) == config


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_diffusers_folder_there_and_back(dtype, tmp_path):
    """A folder that diffusers wrote, in shards, read in its own dtype and written again: the same bits."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    twin = diffusers.AutoencoderKL(**kl.to_foreign(CONFIG)).to(getattr(torch, dtype))
    twin.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    module, params = load_autoencoder(tmp_path / "theirs", param_dtype=jnp.dtype(dtype))
    save_autoencoder(tmp_path / "ours", module, params)
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", torch_dtype=getattr(torch, dtype))
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == getattr(torch, dtype) and torch.equal(tensor, twin.state_dict()[name]), name
    assert module.config == CONFIG


def test_load_into_shards(saved, params):
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))

    def places(abstract):
        def place(leaf):
            axes = [None] * len(leaf.shape)
            if leaf.shape[-1] % 8 == 0:
                axes[-1] = "fsdp"
            return NamedSharding(mesh, PartitionSpec(*axes))

        return jax.tree.map(place, abstract)

    _, loaded = load_autoencoder(saved, shardings=places)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == places(abstract_params(kl.AUTOENCODER, CONFIG))
    assert fingerprint(loaded) == fingerprint(params)


def test_pipeline_folder(params, tmp_path):
    save_autoencoder(tmp_path / "vae", kl.AutoencoderKL(CONFIG), params, dtype=jnp.bfloat16)
    (tmp_path / "model_index.json").write_text("{}")
    module, loaded = load_autoencoder(tmp_path, dtype=jnp.bfloat16, remat="full")
    assert module == kl.AutoencoderKL(CONFIG, dtype=jnp.bfloat16, remat="full")
    wanted = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, wanted)


def rewrite(folder, **change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


def test_checkpoint_of_another_model(saved):
    rewrite(saved, _class_name="SD3Transformer2DModel")
    with pytest.raises(UserError, match="SD3Transformer2DModel, but AutoencoderKL was expected"):
        load_autoencoder(saved)


def test_checkpoint_of_another_size(saved):
    rewrite(saved, latent_channels=16)
    with pytest.raises(UserError, match=r"another shape .*'encoder.conv_out.weight' is \(8, 16, 3, 3\)"):
        load_autoencoder(saved)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load_autoencoder(tmp_path / "nothing")


def test_older_attention_names(params, tmp_path):
    """diffusers up to 0.17 called them query, key, value, proj_attn."""
    from safetensors.numpy import load_file, save_file

    save_autoencoder(tmp_path / "vae", kl.AutoencoderKL(CONFIG), params)
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, old in names.items():
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in tensors.items()}
    assert sum("proj_attn" in name for name in tensors) == 4
    save_file(tensors, path)
    _, loaded = load_autoencoder(tmp_path / "vae")
    assert fingerprint(loaded) == fingerprint(params)
