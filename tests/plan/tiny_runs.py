"""Configs of runs that are planned in the tests."""

from lwd_jax.config import load_config

TINY = load_config(
    {
        "stage": 2,
        "resolution": 64,
        "models": {"autoencoder_variant": "tiny", "backbone_variant": "tiny"},
        "data": {"batch_size": 8},
        "mesh": {"data": 2, "fsdp": 4},
        "sampling": {"steps": 3},
    }
)
STAGE1 = load_config(
    {"stage": 1, "resolution": 64, "models": {"autoencoder_variant": "tiny"}, "data": {"batch_size": 8}}
)
