"""Laws: every flag of the table is one that its compiler knows; a plan compiles with them; every name of a kind finds
them.
"""

import jax
import jax.numpy as jnp
import pytest

from lwd_jax.cli import main
from lwd_jax.cli.plan import MAKERS
from lwd_jax.config import load_config
from lwd_jax.errors import UserError
from lwd_jax.plan import compile as plan
from lwd_jax.plan.flags import FLAGS, as_words, flags_of
from lwd_jax.plan.programs import planned
from lwd_jax.plan.topology import CHIPS, open_topology

TINY = load_config({"stage": 1, "resolution": 64, "models": {"autoencoder_variant": "tiny"}, "data": {"batch_size": 8}})
SMALLEST = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}


def compiled(options, device=None):
    """A tiny function compiled with some options."""
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharding)
    return jax.jit(lambda x: x + 1).lower(x).compile(compiler_options=options)


def test_every_kind_has_a_row():
    assert set(FLAGS) == set(CHIPS) | {"gpu"}


@pytest.mark.parametrize("kind", list(SMALLEST))
def test_the_tpu_compiler_knows_the_flags(kind):
    pytest.importorskip("libtpu")
    (device, *_) = open_topology(SMALLEST[kind]).devices
    compiled(FLAGS[kind], device)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_no_such_flag"):
        compiled(FLAGS[kind] | {"xla_tpu_no_such_flag": True}, device)


@pytest.mark.parametrize("kind", [kind for kind in FLAGS if kind not in SMALLEST])
def test_xla_knows_the_flags_of_gpus(kind):
    """The compiler for CPUs reads the flags of GPUs too, as it is the same library."""
    compiled(FLAGS[kind])
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_flag"):
        compiled(FLAGS[kind] | {"xla_gpu_no_such_flag": True})


@pytest.mark.parametrize(
    ("name", "kind"),
    [("v5e", "v5e"), ("v5e:4x4", "v5e"), ("v5litepod-16", "v5e"), ("tpu-v5-lite-podslice", "v5e"), ("v5p-8", "v5p")]
    + [("tpu-v5p-slice", "v5p"), ("v6e-256", "v6e"), ("tpu-v6e-slice", "v6e"), ("tpu7x-64", "tpu7x")]
    + [("H200:8", "h200"), ("gpu", "gpu")],
)
def test_every_name_of_a_kind_finds_its_flags(name, kind):
    assert flags_of(name) is FLAGS[kind]


def test_another_kind_is_told():
    with pytest.raises(UserError, match="chip kind 'v4-8'"):
        flags_of("v4-8")


def test_a_plan_compiles_with_the_flags():
    """Of a chip whose flags are not known to the compiler here, nothing is compiled."""
    given = {}

    class Lowered:
        def compile(self, compiler_options):
            given.update(compiler_options)
            raise jax.errors.JaxRuntimeError("INTERNAL: enough")

    topology = open_topology("cpu:8")._replace(name="h200:8")
    program = planned(TINY, plan.mesh_of(TINY, topology), "cpu", MAKERS, "decode")._replace(lower=Lowered)
    plan.compile_program(program, plan.mesh_of(TINY, topology), topology)
    assert given == FLAGS["h200"]


def test_the_flags_are_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--flags", "v5litepod-16"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed == as_words(FLAGS["v5e"]) + "\n"
    assert {"--xla_tpu_enable_async_all_to_all=true", "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"} <= set(
        printed.split()
    )
    assert main(["plan", "--flags", "v9"]) == 2
    assert "no chip kind 'v9'" in capsys.readouterr().err
