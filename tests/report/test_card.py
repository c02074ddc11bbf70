"""The model card's code: what it leaves to the user, it says."""

import pytest

from lwd_jax.report.card import _use
from lwd_jax.report.pipeline import TEXT_PARTS

SAMPLING = {"solver": "euler", "steps": 3, "guidance": 2.0, "embedded_guidance": 3.5, "shift": 1.0}


def code(kind, absent=TEXT_PARTS, pipeline="StableDiffusion3Pipeline"):
    text = {"kind": kind} if kind else {}
    manifest = {
        "stage": 2,
        "form": "merged",
        "pipeline": pipeline,
        "dtype": "float32",
        "config": {"resolution": 64},
        "sampling": SAMPLING,
        "text": text,
    }
    return _use(manifest, list(absent))


@pytest.mark.parametrize("kind", ["sd3", ""])
def test_text_encoders_that_are_not_in_the_folder_are_the_users_to_name(kind):
    said = code(kind)
    assert "text_encoder(open_models(folder), text_folder)" in said
    assert 'text_folder = "TEXT_FOLDER"  # fill in' in said and "Set `text_folder`" in said.split("```")[0]
    compile(said.split("```python")[1].split("```")[0], "card", "exec")


def test_hashed_words_need_no_folder_and_a_whole_pipeline_no_states():
    assert "text_folder" not in code("hashed_words") and "text_encoder(open_models(folder))" in code("hashed_words")
    assert "text_encoder(" not in code("sd3", absent=())
