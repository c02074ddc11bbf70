"""Stage 2: FLUX.1-dev fine-tuned with the wavelet mask at 2048 px.

Slice: v6e:4x4 (16 chips), 1 picture a chip.
HBM per chip: state 11.9 GB by formula (11,901,408,320 parameters x 16 bytes: weights, two moments, average, float32,
over 16 chips of `fsdp`), bfloat16 weights and gradients 3.0 GB, and the activations of 16,384 picture tokens a picture
under full remat.

The model is told a guidance of 1 while it trains (URAE). The shift is static: FLUX's own rule would be exp(mu) = 25 at
this size, where hardly a time below 1 is left.

lwd train --config=configs/flux_full_2048.py --workdir=runs/flux_full_2048 \
    --config.data.latents=LATENTS --config.models.backbone=FLUX_FOLDER --config.models.autoencoder=STAGE1_WORKDIR
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "flux_full_2048",
            "stage": 2,
            "resolution": 2048,
            "models": {"autoencoder_variant": "flux", "backbone_variant": "flux-dev"},
            "data": {"batch_size": 16, "workers": 4},
            "matching": {"mask": "time", "floor": 0.3, "time_sampler": "uniform", "shift": 3.0, "guidance": 1.0},
            "optimizer": {
                "learning_rate": 1e-6,
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 1e-4,
                "schedule": "constant",
                "warmup": 0,
            },
            "mesh": {"data": 1, "fsdp": 16, "context": 1},
            "training": {"steps": 20_000, "ema": 0.9998, "save_every": 500, "preview_every": 1000},
            "sampling": {"steps": 28, "guidance": 1.0, "embedded_guidance": 3.5, "shift": 3.0},
        }
    )
