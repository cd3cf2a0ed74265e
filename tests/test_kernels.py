"""Numba functions as XLA operations."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numba import types

from jaxlab import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="host kernels are for the CPU backend")


@kernels.kernel("test.scale_rows")
def scale_rows(item, frame):
  x, s = kernels.operand(frame, 0, types.float32, 2), kernels.operand(frame, 1, types.float32, 1)
  y, total = kernels.result(frame, 0, types.float32, 2), kernels.result(frame, 1, types.float32, 1)
  total[item] = 0
  for j in range(x.shape[1]):
    y[item, j] = s[item] * x[item, j]
    total[item] += y[item, j]


@jax.jit
def scale(x, s):
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(s.shape, s.dtype)]
  return kernels.call(scale_rows, shapes, x, s, items=x.shape[0])


@pytest.mark.parametrize("rows", [0, 1, 2, 1000])
def test_every_item_runs_once(rows):
  x = np.random.default_rng(0).standard_normal((rows, 7)).astype("float32")
  s = np.arange(rows, dtype="float32")
  y, total = scale(x, s)
  np.testing.assert_allclose(y, s[:, None] * x, rtol=1e-6)
  np.testing.assert_allclose(total, (s[:, None] * x).sum(1), rtol=1e-4, atol=1e-4)


def test_many_calls_at_once_on_eight_devices():
  x = np.random.default_rng(1).standard_normal((8, 64, 5)).astype("float32")
  s = np.random.default_rng(2).standard_normal((8, 64)).astype("float32")
  many = jax.pmap(lambda x, s: scale(*scale(x, s)))
  for _ in range(50):
    y, _ = many(x, s)
  first = s[..., None] * x
  np.testing.assert_allclose(y, first.sum(-1)[..., None] * first, rtol=1e-3, atol=1e-4)


def test_two_independent_calls_in_one_program():
  x = jnp.ones((300, 3))

  @jax.jit
  def both(x):
    return scale(x, x[:, 0])[1] + scale(2 * x, x[:, 0])[1]

  for _ in range(20):
    np.testing.assert_array_equal(both(x), np.full(300, 9.0))


def test_vmap_runs_the_kernel_for_each_element():
  x = np.random.default_rng(3).standard_normal((4, 6, 5)).astype("float32")
  s = np.ones(6, "float32")
  y, _ = jax.vmap(scale, (0, None))(x, s)
  np.testing.assert_array_equal(y, x)


def test_a_kernel_is_compiled_only_where_its_results_are_used(monkeypatch):
  @kernels.kernel("test.double")
  def double(item, frame):
    kernels.result(frame, 0, types.float32, 1)[item] = 2 * kernels.operand(frame, 0, types.float32, 1)[item]

  def fail(*args, **kwargs):
    raise AssertionError("compiled")

  x = jnp.arange(3.0)
  function = lambda x: kernels.call(double, [jax.ShapeDtypeStruct(x.shape, x.dtype)], x, items=3)[0]
  with monkeypatch.context() as patch:
    patch.setattr(kernels.numba, "cfunc", fail)
    assert jax.eval_shape(function, x).shape == (3,)
    np.testing.assert_array_equal(jax.jit(lambda x: (function(x), x + 1)[1])(x), x + 1)
    with pytest.raises(AssertionError, match="compiled"):
      function(x)
    with pytest.raises(AssertionError, match="compiled"):
      jax.jit(function).lower(x)
  np.testing.assert_array_equal(function(x), 2 * x)
  np.testing.assert_array_equal(jax.vmap(function)(jnp.stack([x, 3 * x])), [2 * x, 6 * x])


def test_another_interface_version_is_not_used(tmp_path, monkeypatch):
  header = tmp_path / "xla/ffi/api/c_api.h"
  header.parent.mkdir(parents=True)
  header.write_text("#define XLA_FFI_API_MAJOR 1\n")
  monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
  assert not kernels.supported.__wrapped__()
  header.write_text("#define XLA_FFI_API_MAJOR 0\n")
  assert kernels.supported.__wrapped__()


def test_a_kernel_that_no_cache_would_find_is_refused():
  import numba

  twice = numba.njit(lambda x: 2 * x)
  with pytest.raises(TypeError, match="twice: got a function compiled by numba"):

    @kernels.kernel("test.uncached")
    def uncached(item, frame):
      twice(item)


def test_kernels_are_found_in_the_cache_by_the_next_process():
  """What tells a cached kernel from another, its name and the values it closes over, is the same in a new process."""
  script = """
import hashlib
from jaxlab import kernels
from jaxlab.nn import _attention, _product, gelu, layer_norm
from numba.core.serialize import dumps
made = [make(8, pairs) for make in (_attention.attend, _attention.gradient, _product.outer) for pairs in (False, True)]
made += [gelu._values(True), gelu._gradients(False), layer_norm._rows(True, False)]
made += [layer_norm._rows_gradient(True, False)]
for kernel in made:
  closure = dumps(tuple(cell.cell_contents for cell in kernel.function.__closure__))
  print(kernels._cached_as(kernel), hashlib.sha256(closure).hexdigest())
"""
  run = lambda: subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
  first = run()
  assert first == run()
  assert len({line.split()[0] for line in first.splitlines()}) == 10  # each has an index of its own


def test_a_change_in_what_a_kernel_calls_is_another_kernel_to_the_cache(tmp_path, monkeypatch):
  from jaxlab.nn import _attention, _tiles, dropout, softmax

  module = sys.modules[_attention.__name__]
  digest = kernels._digest.__wrapped__
  before, other = digest(module), digest(sys.modules[dropout.__name__])
  for helper in (softmax, _tiles):
    changed = tmp_path / "changed.py"
    changed.write_text(Path(helper.__file__).read_text() + "# more\n")
    with monkeypatch.context() as patch:
      patch.setattr(helper, "__file__", str(changed))
      assert digest(module) != before
      assert digest(sys.modules[dropout.__name__]) == other  # which takes nothing from it
  assert digest(module) == before


@pytest.mark.parametrize("count", range(1, 9))
def test_masked_lanes(count):
  import numba

  @numba.extending.intrinsic
  def move(typing, source, target, n):
    def codegen(context, builder, signature, args):
      vectors = kernels.Vectors(builder, 8)
      mask = vectors.mask(args[2])
      vectors.store_masked(vectors.load_masked(args[0], mask), args[1], mask)
      return context.get_dummy_value()

    word = types.int64
    return types.void(word, word, word), codegen

  source, target = np.arange(1, 9, dtype="float32"), np.zeros(8, "float32")
  numba.njit(lambda s, t, n: move(s, t, n))(source.ctypes.data, target.ctypes.data, count)
  np.testing.assert_array_equal(target, np.where(np.arange(8) < count, source, 0))
