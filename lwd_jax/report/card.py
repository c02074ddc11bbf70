"""The model card of an exported folder: what was trained, how, with what result, and how to use it in PyTorch."""

import json
import statistics

from etils.epath import Path
from huggingface_hub import ModelCard, ModelCardData

from lwd_jax.report.pipeline import FAMILIES, SD3
from lwd_jax.train import metrics

PAPER = "https://arxiv.org/abs/2506.00433"
WINDOW = 10  # logged lines that a figure is averaged over
_FIGURES = {
    1: {
        "loss": "loss",
        "reconstruction": "reconstruction term",
        "scale_consistency": "scale consistency term",
        "lpips": "LPIPS-VGG",
        "psnr": "PSNR (dB)",
    },
    2: {
        "loss": "loss",
        "loss_detail": "unmasked loss, most detailed quarter of the positions",
        "loss_smooth": "unmasked loss, smoothest quarter of the positions",
        "supervised_fraction": "supervised fraction of the positions",
    },
}
_SOLVERS = {family.pipeline: family.solver for family in FAMILIES.values()}
_INHERITED = ("license", "license_name", "license_link", "base_model", "language")


def last_figures(workdir: Path, stage: int) -> dict[str, float]:
    """Label -> mean over the last WINDOW logged lines that have it."""
    lines = metrics.read(workdir)
    figures = {}
    for name, label in _FIGURES[stage].items():
        values = [line[name] for line in lines if line.get(name) is not None]
        if values:
            figures[label] = statistics.fmean(values[-WINDOW:])
    return figures


def _figures(workdir: Path, manifest: dict) -> str:
    figures = last_figures(workdir, manifest["stage"])
    if not figures:
        return "The run logged no figures."
    rows = "\n".join(f"| {label} | {value:.4g} |" for label, value in figures.items())
    head = f"Means over the last {WINDOW} logged windows of the training run (training data)."
    return f"{head}\n\n| figure | value |\n|---|---|\n{rows}"


_ADAPTERS = {
    "none": "",
    "lora": ", LoRA of rank {rank} over a frozen base",
    "minor_components": ", adapters of the {rank} minor components over a frozen base",
}


_BY = f"lwd_jax ([Latent Wavelet Diffusion]({PAPER}))"


def _adapters(config: dict) -> str:
    return _ADAPTERS[config["adapter"]["kind"]].format(**config["adapter"])


def _objective(config: dict) -> str:
    if config["stage"] == 1:
        terms = config["reconstruction"]
        return (
            f"Stage 1: scale-consistent fine-tuning of the autoencoder, {terms['distance']} reconstruction, scale "
            f"consistency weighted {terms['alpha']}, KL {terms['beta']}, LPIPS {terms['lpips']}."
        )
    matching = config["matching"]
    what = _adapters(config)
    if matching["mask"] == "everywhere":
        return f"Stage 2{what}: flow matching without a mask (the baseline)."
    return (
        f"Stage 2{what}: flow matching under the wavelet mask `{matching['mask']}` ({matching['wavelet']}, floor "
        f"{matching['floor']}, map of the {matching['source']} latent)."
    )


def _training(manifest: dict) -> str:
    config, optimizer = manifest["config"], manifest["config"]["optimizer"]
    if manifest["step"] == 0:
        return f"Imported with {_BY} and not trained{_adapters(config)}; in {manifest['dtype']}."
    return (
        f"{_objective(config)} Trained with {_BY} at {config['resolution']} px, batch {config['data']['batch_size']}, "
        f"{optimizer['name']} at {optimizer['learning_rate']:g}, for "
        f"{manifest['step']} steps; these are the {'averaged (EMA)' if manifest['weights'] == 'ema' else 'plain'} "
        f"weights in {manifest['dtype']}."
    )


def _origin(config: dict) -> str:
    models = config["models"]
    source = models["backbone"] if config["stage"] == 2 else models["autoencoder"]
    return f"It started from `{Path(source).name}`." if source else "It started from random weights."


_AUTOENCODER_USE = """```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
```"""
_PIPELINE_USE = """```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained(folder, torch_dtype=torch.{dtype}{absent})
picture = pipe(
    "a red boat on a lake",
    max_sequence_length={max_length},
    height={side},
    width={side},
    num_inference_steps={steps},
{guidance}
).images[0]
```"""
_STATES_USE = """This folder has no text encoders (captions were encoded by `{kind}`): the pipeline takes text states.
{fill_in}
```python
import torch
from diffusers import {pipeline}
from lwd_jax.report.pipeline import open_models, text_encoder

{set_folder}states = text_encoder(open_models(folder){text_folder}).encode(["a red boat on a lake", ""])
tokens, pooled = (torch.tensor(part, dtype=torch.{dtype}) for part in (states.tokens, states.pooled))
pipe = {pipeline}.from_pretrained(folder, torch_dtype=torch.{dtype}{absent})
{adapters}picture = pipe(
    prompt_embeds=tokens[:1],
    pooled_prompt_embeds=pooled[:1],
    negative_prompt_embeds=tokens[1:],
    negative_pooled_prompt_embeds=pooled[1:],
    height={side},
    width={side},
    num_inference_steps={steps},
{guidance}
).images[0]
```"""


_ADAPTERS_USE = """```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("BASE", torch_dtype=torch.{dtype})  # fill in: the base
pipe.load_lora_weights(folder)
```"""
_KOHYA_USE = "For programs that read the names of kohya's scripts, such as ComfyUI; diffusers reads the other layout."


# Where the text encoder has weights, they are the user's to name.
_FILL_IN = """Set `text_folder` to the diffusers folder that holds them; it is checked that they are the same.
"""
_SET_FOLDER = """text_folder = "TEXT_FOLDER"  # fill in: a folder with text_encoder/, tokenizer/ and their kin
"""


def _guidance(manifest: dict, states: bool) -> str:
    """The arguments of a pipeline's call that guide; `states`: it is given states of the negative prompt."""
    sampling = manifest["sampling"]
    if manifest["pipeline"] == SD3.pipeline:
        return f"    guidance_scale={sampling['guidance']},"
    lines = [f"    guidance_scale={sampling['embedded_guidance']},"]
    if sampling["guidance"] > 1:
        lines += [f"    true_cfg_scale={sampling['guidance']},"] + ([] if states else ['    negative_prompt="",'])
    return "\n".join(lines)


def _positions(config: dict) -> str:
    """What diffusers' model cannot be told, where the run has it."""
    models = config["models"]
    if not models["proportional_attention"] and set(models["ntk"]) == {1.0}:
        return ""
    factors = ", ".join(f"{factor:g}" for factor in models["ntk"])
    attention = "proportional" if models["proportional_attention"] else "plain"
    return (
        f"\nIt was trained with NTK factors {factors} of RoPE's base and {attention} attention. diffusers' own model "
        "knows neither NTK nor proportional attention and draws without; lwd sample draws as it was trained.\n"
    )


def _solver(manifest: dict) -> str:
    """What the folder's scheduler does otherwise than the run."""
    asked, able = manifest["sampling"]["solver"], _SOLVERS[manifest["pipeline"]]
    if able in ("", asked) or manifest["form"] != "merged":
        return ""
    return f"\nThe run sampled with {asked}. {manifest['pipeline']} runs with {able} alone, and so does this folder.\n"


def _use(manifest: dict, absent: list[str], adapters: str = "") -> str:
    """`adapters`: the lines that load adapters over a pipeline without text encoders."""
    if manifest["stage"] == 1:
        return _AUTOENCODER_USE
    if manifest["form"] != "merged":
        return _ADAPTERS_USE.format(**manifest) if manifest["form"] == "adapter" else _KOHYA_USE
    sampling, text = manifest["sampling"], manifest["text"]
    needs_folder = text.get("kind") != "hashed_words"
    return (_STATES_USE if "text_encoder" in absent else _PIPELINE_USE).format(
        dtype=manifest["dtype"],
        side=manifest["config"]["resolution"],
        steps=sampling["steps"],
        pipeline=manifest["pipeline"],
        guidance=_guidance(manifest, states="text_encoder" in absent),
        kind=text.get("kind", "something that the run does not name"),
        fill_in=_FILL_IN if needs_folder else "",
        set_folder=_SET_FOLDER if needs_folder else "",
        text_folder=", text_folder" if needs_folder else "",
        max_length=text.get("settings", {}).get("max_length", 512 if text.get("kind") == "flux" else 256),  # its own
        absent="".join(f", {part}=None" for part in absent),
        adapters=adapters,
    )


def code_with_adapters(manifest: dict, absent: list[str]) -> str:
    """The code on the card of a pipeline without text encoders, with adapters over it; `adapters` in it is the path of
    their folder.

    Args:
      manifest, absent: of the pipeline's folder, as of `write_card`.
    """
    code = _use(manifest, absent, "pipe.load_lora_weights(adapters)\n")
    return code.partition("```python\n")[2].removesuffix("\n```")


def inherited(source: Path | None) -> dict:
    """Licence, base model and languages that the card of the models it started from declares; {} = none."""
    if source is None or not (source / "README.md").is_file():
        return {}
    declared = ModelCard.load(source / "README.md", ignore_metadata_errors=True).data.to_dict()
    return {name: declared[name] for name in _INHERITED if name in declared}


def write_card(folder: Path, manifest: dict, workdir: Path, *, absent: list[str], base: Path | None) -> None:
    """Writes README.md.

    Args:
      folder: the exported folder.
      manifest: the content of its lwd.json.
      workdir: of the run, for metrics.jsonl.
      absent: the parts of a pipeline that are not in the folder: text encoders and tokenizers.
      base: the diffusers folder the run started from, whose licence the weights keep; None = random weights.
    """
    config, stage = manifest["config"], manifest["stage"]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image" if stage == 2 else "image-to-image",
        tags=["latent-wavelet-diffusion", "lwd_jax"],
        **inherited(base),
    )
    prints = "\n".join(f"- {name}: `{value}`" for name, value in manifest["fingerprints"].items())
    text = f"""---
{data.to_yaml()}
---

# {config["name"] or f"Latent Wavelet Diffusion, stage {stage}"}

{_training(manifest)} {_origin(config)}

## Use

`folder` is the path of this folder.

{_use(manifest, absent)}
{_positions(config) + _solver(manifest) if stage == 2 else ""}
## Figures

{_figures(workdir, manifest)}

## Weights

SHA-256 of names, shapes and float32 values, whatever the files are stored as:

{prints}

## Config

```json
{json.dumps(config, indent=2)}
```
"""
    ModelCard(text).save(folder / "README.md")
