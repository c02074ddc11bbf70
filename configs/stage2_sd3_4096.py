"""Stage 2: SD3-medium fine-tuned with the wavelet mask at 4096 px.

Slice: v5e:4x4 (16 chips), 1 picture on 4 chips (`context` splits its height).
HBM per chip: state 2.0 GB by formula (2,028,328,000 parameters x 16 bytes: weights, two moments, average, float32, over
4 chips of `fsdp` x 4 of `context`), bfloat16 weights and gradients 0.5 GB, and the activations of 65,536 picture tokens
a picture under full remat.

lwd train --config=configs/stage2_sd3_4096.py --workdir=runs/stage2_sd3_4096 \
    --config.data.latents=LATENTS --config.models.backbone=SD3_FOLDER --config.models.autoencoder=STAGE1_WORKDIR
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "stage2_sd3_4096",
            "stage": 2,
            "resolution": 4096,
            "models": {"autoencoder_variant": "sd3", "backbone_variant": "sd3-medium"},
            "data": {"batch_size": 4, "workers": 4},
            "matching": {"mask": "time", "floor": 0.3, "time_sampler": "logit_normal", "shift": 3.0},
            "optimizer": {
                "learning_rate": 1e-6,
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 1e-4,
                "schedule": "constant",
                "warmup": 0,
            },
            "mesh": {"data": 1, "fsdp": 4, "context": 4},
            "training": {"steps": 20_000, "ema": 0.9998, "save_every": 500, "preview_every": 1000},
            "sampling": {"steps": 28, "guidance": 5.0, "shift": 3.0},
        }
    )
