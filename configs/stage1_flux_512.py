"""Stage 1: scale-consistent fine-tuning of the FLUX autoencoder at 512 px.

Slice: v5e:2x4 (8 chips), 2 pictures a chip; whole parameters on every chip, the batch over `data`.
HBM per chip: state 1.3 GB by formula (83,819,683 parameters x 16 bytes: weights, two moments, average), and the
activations of 2 pictures at 512 px under full remat. Needs the extra [lpips].

lwd train --config=configs/stage1_flux_512.py --workdir=runs/stage1_flux_512 \
    --config.data.dataset=DATASET --config.models.autoencoder=FLUX_FOLDER
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "stage1_flux_512",
            "stage": 1,
            "resolution": 512,
            "models": {"autoencoder_variant": "flux"},
            "data": {"batch_size": 16, "workers": 8},
            "reconstruction": {"alpha": 0.1, "beta": 0.0, "lpips": 0.05, "scales": (2, 4)},
            "optimizer": {
                "learning_rate": 1e-5,
                "b1": 0.9,
                "b2": 0.99,
                "weight_decay": 0.01,
                "schedule": "cosine",
                "warmup": 500,
            },
            "mesh": {"data": -1, "fsdp": 1},
            "training": {"steps": 60_000, "ema": 0.9998, "save_every": 1000, "preview_every": 1000},
        }
    )
