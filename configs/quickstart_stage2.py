"""Quickstart, stage 2: a small SD3 backbone under the wavelet mask, on the latents of the quickstart's autoencoder.

Trains on any machine, in float32; the state is below 0.1 GB by formula (16 bytes a parameter). `lwd quickstart` runs it
from random weights without a mask, then twice from there on the same batches: with this mask, and as the plain baseline
(matching.mask=everywhere).

lwd train --config=configs/quickstart_stage2.py --workdir=runs/lwd \
    --config.data.latents=LATENTS --config.models.autoencoder=runs/after --config.models.backbone=runs/base
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "quickstart_stage2",
            "stage": 2,
            "resolution": 128,
            "dtype": "float32",
            "remat": "none",
            "models": {"autoencoder_variant": "tiny", "backbone_variant": "tiny"},
            "data": {"batch_size": 8, "workers": 0, "buckets": False, "held_out": 8},
            # At 16 x 16 latent positions the noise levels need no shift towards 1: shift 3 is for 1024 px.
            "matching": {"mask": "time", "floor": 0.3, "shift_rule": "none"},
            "optimizer": {"learning_rate": 3e-4, "weight_decay": 0.0, "schedule": "cosine", "warmup": 20},
            "training": {"steps": 120, "ema": 0.98, "log_every": 5, "save_every": 60, "preview_every": 120, "keep": 1},
            "sampling": {"steps": 20, "guidance": 2.0, "shift": 1.0},
        }
    )
