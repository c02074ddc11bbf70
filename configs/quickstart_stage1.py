"""Quickstart, stage 1: a small f8 autoencoder with 16 channels, on crops of a few photographs at 128 px.

Trains on any machine, in float32; the state is below 0.1 GB by formula (16 bytes a parameter). `lwd quickstart` runs it
twice: without the scale term from random weights (the autoencoder "before"), then with it, as below, from there
("after").

lwd train --config=configs/quickstart_stage1.py --workdir=runs/after \
    --config.data.dataset=DATASET --config.models.autoencoder=runs/before
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "quickstart_stage1",
            "stage": 1,
            "resolution": 128,
            "dtype": "float32",
            "remat": "none",
            "models": {"autoencoder_variant": "tiny"},
            "data": {"batch_size": 4, "workers": 0, "buckets": False, "held_out": 8},
            # LPIPS is left out: its weights are an extra download. One scale, where the full runs draw from 2 and 4: on
            # two cores each takes half a minute to compile.
            "reconstruction": {"distance": "l1", "alpha": 0.25, "beta": 1e-4, "lpips": 0.0, "scales": (2,)},
            # In 210 steps from random weights Muon leaves a third less of the error than AdamW.
            "optimizer": {
                "name": "muon",
                "learning_rate": 3e-3,
                "weight_decay": 0.0,
                "schedule": "cosine",
                "warmup": 20,
            },
            "training": {"steps": 150, "ema": 0.98, "log_every": 5, "save_every": 100, "preview_every": 150, "keep": 1},
        }
    )
