"""How the tests compile: quickly. It is most of their time."""

from importlib.metadata import version

# Emitters that later versions no longer let one choose.
_OLD = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)

# Level 0 spares LLVM's optimisations, half of the time; one module of LLVM each, and the older emitters of fusions, a
# third of the rest; sums in one kernel and not in a tree of several, a fifth of a whole step's. XLA's other passes run
# as ever.
QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
QUICKLY += " --xla_disable_hlo_passes=tree_reduction_rewriter"
QUICKLY += " --xla_cpu_use_fusion_emitters=false" * _OLD
# Compiler options of tests of what that might hide: as users compile.
AS_USERS = {"xla_backend_optimization_level": 3, "xla_disable_hlo_passes": ""}
AS_USERS |= {"xla_cpu_use_fusion_emitters": True} if _OLD else {}
