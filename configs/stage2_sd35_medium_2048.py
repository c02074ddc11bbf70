"""Stage 2: SD3.5-medium fine-tuned with the wavelet mask at 2048 px.

Slice: v5e:4x4 (16 chips), 1 picture a chip.
HBM per chip: state 2.2 GB by formula (2,243,171,520 parameters x 16 bytes: weights, two moments, average, float32, over
16 chips of `fsdp`), bfloat16 weights and gradients 0.6 GB, and the activations of 16,384 picture tokens a picture under
full remat.

lwd train --config=configs/stage2_sd35_medium_2048.py --workdir=runs/stage2_sd35_medium_2048 \
    --config.data.latents=LATENTS --config.models.backbone=SD3_FOLDER --config.models.autoencoder=STAGE1_WORKDIR
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "stage2_sd35_medium_2048",
            "stage": 2,
            "resolution": 2048,
            "models": {"autoencoder_variant": "sd3", "backbone_variant": "sd3.5-medium"},
            "data": {"batch_size": 16, "workers": 4},
            "matching": {"mask": "time", "floor": 0.3, "time_sampler": "logit_normal", "shift": 3.0},
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
            "sampling": {"steps": 28, "guidance": 5.0, "shift": 3.0},
        }
    )
