"""Laws: a program is compiled once for what it depends on, and again when any of that changes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwd_jax.cli.plan import MAKERS
from lwd_jax.config import load_config
from lwd_jax.plan import cache
from lwd_jax.plan import compile as plan
from lwd_jax.plan.count import Operations
from lwd_jax.plan.result import Memory, Result
from lwd_jax.plan.topology import parse
from lwd_jax.plan.traffic import Traffic

CONFIG = load_config({"stage": 1, "resolution": 64, "models": {"autoencoder_variant": "tiny"}})
RESULT = Result(
    "decode", 8, {"data": 8}, 1e6, 2e9, Operations(2e9, 1e9), Memory(1.0, 2.0, 3.0), 6.0, 7.0, 8.0,
    (Traffic("all-gather", "fsdp", 2, 3.5),), 12.5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_there_and_back():
    assert cache.read("a") is None
    cache.write("a", RESULT)
    assert cache.read("a") == RESULT
    bare = dataclasses.replace(RESULT, memory=None, peak=None, traffic=(), missing="too large")
    cache.write("a", bare)
    assert cache.read("a") == bare
    assert [file.name for file in cache.folder().iterdir()] == ["a.json"]


def test_a_damaged_result_is_none():
    cache.write("a", RESULT)
    file = cache.folder() / "a.json"
    for text in (file.read_text()[:-9], "[]", '{"program": "decode"}'):
        file.write_text(text)
        assert cache.read("a") is None


def test_the_key_holds_what_the_result_depends_on(monkeypatch):
    mesh = Mesh(jax.devices()[:2], "data")

    def arguments(size, *axes):
        return [jax.ShapeDtypeStruct((size,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))]

    other = dataclasses.replace(CONFIG, remat="none")
    keys = [
        cache.key_of(CONFIG, parse("v5e:2x4"), "decode", arguments(8)),
        cache.key_of(other, parse("v5e:2x4"), "decode", arguments(8)),
        cache.key_of(CONFIG, parse("v6e:2x4"), "decode", arguments(8)),
        cache.key_of(CONFIG, parse("v5e:2x4", 2), "decode", arguments(8)),
        cache.key_of(CONFIG, parse("v5e:2x4"), "encode", arguments(8)),
        cache.key_of(CONFIG, parse("v5e:2x4"), "decode", arguments(4)),
        cache.key_of(CONFIG, parse("v5e:2x4"), "decode", arguments(8, "data")),
    ]
    assert keys[0] == cache.key_of(CONFIG, parse("v5e:2x4"), "decode", arguments(8))
    for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
        monkeypatch.setenv(name, "--xla_tpu_scheduler_percent_shared_memory_limit=4")
        keys.append(cache.key_of(CONFIG, parse("v5e:2x4"), "decode", arguments(8)))
    monkeypatch.setattr(cache, "_version", lambda package: "another")
    keys.append(cache.key_of(CONFIG, parse("v5e:2x4"), "decode", arguments(8)))
    assert len(set(keys)) == len(keys)


def test_what_is_kept_is_not_compiled_again(monkeypatch):
    compiled = []
    monkeypatch.setattr(plan, "compile_program", lambda *given: compiled.append(given) or RESULT)
    topology = parse("v5e:2x4")._replace(devices=jax.devices()[:8])
    for fresh in (False, False, True):
        assert plan.plan_program(CONFIG, topology, MAKERS, "decode", fresh) == RESULT
    assert len(compiled) == 2


def test_what_was_ended_early_is_nobody_elses(monkeypatch):
    """A whole result serves both ways; one without code serves only who asked for no more."""
    asked = []

    def compiled(program, mesh, topology, fast=None):
        asked.append(fast is not None)
        return dataclasses.replace(RESULT, missing="no code") if fast else RESULT

    monkeypatch.setattr(plan, "compile_program", compiled)
    topology = parse("v5e:2x4")._replace(devices=jax.devices()[:8])
    found = [plan.plan_program(CONFIG, topology, MAKERS, "decode", fast=fast) for fast in (True, True, False, True)]
    assert [result.missing for result in found] == ["no code", "no code", "", ""]
    assert asked == [True, False]
