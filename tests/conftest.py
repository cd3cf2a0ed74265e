"""Settings that must precede the first import of JAX, and fixtures of the whole suite."""

import gc
import os

# Parallel forms are tested on eight virtual devices. Toy networks compile for longer than they run, so LLVM is told not
# to optimise, nor to cut programs into many modules, and loops are emitted as LLVM's code at once, without MLIR between
# (all this is nearly half of compile time); XLA's own passes are those of every program.
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
  )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import functools

import hypothesis
import jax
import pytest
from jax._src.interpreters import mlir

# JAX makes a context for each program that it compiles, and loads all dialects into it: a quarter of the time of small
# programs. Those of a file share one here.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

# Compiling inside a property makes its first example slow; deadlines would only measure that.
hypothesis.settings.register_profile("jaxlab", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("jaxlab")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """A file's tests stay in one process, so that what they share is compiled once."""
  for item in items:
    if item.get_closest_marker("xdist_group") is None:
      item.add_marker(pytest.mark.xdist_group(str(item.path)))


def pytest_collection_finish():
  """What is imported by now stays: looking through it again and again for garbage took a fourteenth of the time."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(10_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
  """A file leaves no compiled programs: in a process that holds thousands, compiling one more takes twice as long."""
  yield
  jax.clear_caches()
  mlir.make_ir_context.cache_clear()
