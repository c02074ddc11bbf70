"""Stage 2: LoRA over a frozen SD3-medium, with the wavelet mask, at 1024 px.

The released recipe (rank 16, Prodigy, 2,000 steps, batch 4, floor .3), of the attention of both streams.

Slice: v5e:2x2 (4 chips), 1 picture a chip.
HBM per chip: state 1.1 GB by formula (2,028,328,000 frozen parameters x 2 bytes, bfloat16, and 9,388,032 that train x
20 bytes: weight, two moments and two more of Prodigy, float32, over 4 chips of `fsdp`), gradients 0.0 GB, and the
activations of 4,096 picture tokens a picture under full remat.

lwd train --config=configs/stage2_sd3_lora_1024.py --workdir=runs/stage2_sd3_lora_1024 \
    --config.data.latents=LATENTS --config.models.backbone=SD3_FOLDER --config.models.autoencoder=STAGE1_WORKDIR
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "stage2_sd3_lora_1024",
            "stage": 2,
            "resolution": 1024,
            "param_dtype": "bfloat16",
            "models": {"autoencoder_variant": "sd3", "backbone_variant": "sd3-medium"},
            "data": {"batch_size": 4, "workers": 4},
            "matching": {"mask": "time", "floor": 0.3, "time_sampler": "logit_normal", "shift": 3.0},
            "adapter": {"kind": "lora", "rank": 16, "alpha": 16.0, "targets": ["q", "k", "v", "out"]},
            "optimizer": {
                "name": "prodigy",
                "learning_rate": 1.0,
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 1e-4,
                "schedule": "constant",
                "warmup": 0,
            },
            "mesh": {"data": 1, "fsdp": 4, "context": 1},
            # No average: over so few steps it would still be mostly the start.
            "training": {"steps": 2000, "ema": 0.0, "save_every": 500, "preview_every": 500},
            "sampling": {"steps": 28, "guidance": 5.0, "shift": 3.0},
        }
    )
