"""--config: a file that cannot be used is one sentence that says why."""

import json

import pytest

from lwd_jax.cli import main
from lwd_jax.cli.config_flag import read_config
from lwd_jax.errors import UserError

HEAD = "from ml_collections import ConfigDict\n\n\ndef get_config():\n    "


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("run.json", '{"stage": 1,', "is not sound JSON"),
        ("run.json", "[1, 2]", "must hold a JSON object, but holds a list"),
        ("run.py", HEAD + "return ConfigDict({'stage': 1)\n", "SyntaxError on line 5"),
        ("run.py", HEAD + "return ConfigDict({'stage': stag})\n", "NameError on line 5: name 'stag' is not defined"),
        ("run.py", "import no_such_module\n", "ModuleNotFoundError on line 1"),
        ("run.py", HEAD + "return {'stage': 1}\n", "must return an ml_collections.ConfigDict, but returned a dict"),
        ("run.py", "stage = 1\n", "has no get_config()"),
        ("run.yaml", "stage: 1\n", "is neither"),
        ("run.json", '{"stag": 1}', "Did you mean 'stage'?"),
    ],
)
def test_a_broken_config_file_is_one_sentence(tmp_path, capsys, name, text, words):
    (tmp_path / name).write_text(text)
    assert main(["train", "--config", str(tmp_path / name), "--workdir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lwd: ") and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "run").exists()


def test_json_and_python_say_the_same_and_overrides_change_it(tmp_path):
    values = {"stage": 1, "optimizer": {"warmup": 3}}
    (tmp_path / "run.json").write_text(json.dumps(values))
    (tmp_path / "run.py").write_text(f"{HEAD}return ConfigDict({values})\n")
    files = [str(tmp_path / name) for name in ("run.json", "run.py")]
    assert read_config(files[0], []) == read_config(files[1], [])
    changed = read_config(files[0], ["--config.optimizer.warmup=7", "--config.name=a run", "--config.data.flip=false"])
    assert (changed.optimizer.warmup, changed.name, changed.data.flip) == (7, "a run", False)
    for override in ("--config.optimizer.warmup", "--config.stage.warmup=1", "--config.optimizer.warmup={[]: 1}"):
        with pytest.raises(UserError):
            read_config(files[0], [override])
