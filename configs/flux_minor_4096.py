"""Stage 2: minor-component adapters over a frozen FLUX.1-dev, with the wavelet mask, at 4096 px.

URAE's second step (arXiv 2503.16322): what trains are the 16 smallest singular components of each kernel, over the
LoRA of 2048 px, whose workdir is where it starts from. NTK factors of 10 and proportional attention bring FLUX to this
size; `lwd sample` and the previews draw with them too.

Slice: v6e:4x4 (16 chips), 1 picture on 8 chips (`context` splits its height).
HBM per chip: state 1.5 GB by formula (11,901,408,320 frozen parameters x 2 bytes, bfloat16, and 18,677,760 that train x
20 bytes: weight, two moments and two more of Prodigy, float32, over 2 chips of `fsdp` x 8 of `context`), gradients 0.0
GB, and the activations of 65,536 picture tokens a picture under full remat. The factors that do not train take 0.1 GB
more.

lwd train --config=configs/flux_minor_4096.py --workdir=runs/flux_minor_4096 \
    --config.data.latents=LATENTS --config.models.backbone=runs/flux_lora_2048 \
    --config.models.autoencoder=STAGE1_WORKDIR
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "flux_minor_4096",
            "stage": 2,
            "resolution": 4096,
            "param_dtype": "bfloat16",
            "models": {
                "autoencoder_variant": "flux",
                "backbone_variant": "flux-dev",
                "ntk": [10.0, 10.0],
                "proportional_attention": True,
            },
            "data": {"batch_size": 2, "workers": 4},
            "matching": {"mask": "time", "floor": 0.3, "time_sampler": "uniform", "shift": 3.0, "guidance": 1.0},
            "adapter": {
                "kind": "minor_components",
                "rank": 16,
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
            "mesh": {"data": 1, "fsdp": 2, "context": 8},
            # No average: Prodigy finds its step size on the way, and the average would hold on to what was before.
            "training": {"steps": 10_000, "ema": 0.0, "save_every": 500, "preview_every": 500},
            "sampling": {"steps": 28, "guidance": 1.0, "embedded_guidance": 3.5, "shift": 3.0},
        }
    )
