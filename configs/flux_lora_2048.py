"""Stage 2: LoRA over a frozen FLUX.1-dev, with the wavelet mask, at 2048 px.

The released recipe (rank 16, Prodigy, 2,000 steps, batch 4, floor .3), of the attention of pictures: q, k, v and, where
blocks have two streams, out. The model is told a guidance of 1 while it trains (URAE). The shift is static: FLUX's
own rule is exp(mu) = 3.2 at 1024 px, but 25 at 2048 px.

Slice: v6e:2x2 (4 chips), 1 picture a chip.
HBM per chip: state 6.0 GB by formula (11,901,408,320 frozen parameters x 2 bytes, bfloat16, and 18,677,760 that train x
20 bytes: weight, two moments and two more of Prodigy, float32, over 4 chips of `fsdp`), gradients 0.0 GB, and the
activations of 16,384 picture tokens a picture under full remat.

lwd train --config=configs/flux_lora_2048.py --workdir=runs/flux_lora_2048 \
    --config.data.latents=LATENTS --config.models.backbone=FLUX_FOLDER --config.models.autoencoder=STAGE1_WORKDIR
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "flux_lora_2048",
            "stage": 2,
            "resolution": 2048,
            "param_dtype": "bfloat16",
            "models": {"autoencoder_variant": "flux", "backbone_variant": "flux-dev"},
            "data": {"batch_size": 4, "workers": 4},
            "matching": {"mask": "time", "floor": 0.3, "time_sampler": "uniform", "shift": 3.0, "guidance": 1.0},
            "adapter": {
                "kind": "lora",
                "rank": 16,
                "alpha": 16.0,
                "targets": ["picture/(q|k|v|out)", "single_blocks/(q|k|v)"],
            },
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
            # No average: Prodigy finds its step size on the way, and the average would hold on to what was before.
            "training": {"steps": 2000, "ema": 0.0, "save_every": 500, "preview_every": 500},
            "sampling": {"steps": 28, "guidance": 1.0, "embedded_guidance": 3.5, "shift": 3.0},
        }
    )
