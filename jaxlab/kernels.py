"""Host kernels inside compiled programs: a numba function as an XLA operation on CPU, without copies or Python.

XLA's CPU backend has no good form for a few operations that our systems live on (depthwise convolution, sparse
products). Such an operation is written as a numba function of one work item,

    @kernels.kernel("double")
    def double(item, frame):
      x, y = kernels.operand(frame, 0, types.float32, 2), kernels.result(frame, 0, types.float32, 2)
      for j in range(x.shape[1]):
        y[item, j] = 2 * x[item, j]

and `call` runs it for `item = 0 .. items - 1` on XLA's own thread pool, as part of whatever program it is traced into.
Operands and results are C-ordered views of XLA's buffers; results are not initialised. Items run in any order and at
once, so each must write its own part of the results.

XLA calls a C function with one `XLA_FFI_CallFrame*` (jaxlib's `xla/ffi/api/c_api.h`; the binary interface is stable
within its major version, which `supported` checks). Every field used here is eight bytes wide, so the functions below
read the structures as arrays of words, at the positions named next.
"""

import contextlib
import contextvars
import ctypes
import dataclasses
import functools
import hashlib
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import llvmlite.binding
import numba
import numpy as np
from jax.interpreters import batching, mlir
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable
from numba.np import arrayobj

# Positions, in words, inside the structures of c_api.h.
_FRAME_EXTENSION, _FRAME_API, _FRAME_CONTEXT = 1, 2, 3
_FRAME_OPERANDS, _FRAME_RESULTS, _FRAME_ATTRIBUTES = 9, 14, 20
_BUFFER_DATA, _BUFFER_RANK, _BUFFER_DIMENSIONS = 3, 4, 5
_SCALAR_VALUE = 1
_API_SCHEDULE, _API_NUM_THREADS = 17, 18
_EXTENSION_METADATA, _METADATA_VERSION = 3, 3
_VERSION_MAJOR, _VERSION_MINOR = 0, 3  # of the interface described here

# Words of the block that the threads of one call share.
_NEXT, _FINISHED, _OWNERS, _FRAME, _ITEMS, _KERNEL, _BLOCK_BYTES = 0, 1, 2, 3, 4, 5, 48

_OPTIONS = {"fastmath": True, "error_model": "numpy"}  # of kernels and of what they close over

_word = types.int64


@functools.cache
def supported() -> bool:
  """Whether this jaxlib speaks the interface that this module implements."""
  header = pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
  if not header.is_file():
    return False
  major = re.search(r"#define XLA_FFI_API_MAJOR (\d+)", header.read_text())
  return major is not None and int(major.group(1)) == _VERSION_MAJOR


_off = contextvars.ContextVar("jaxlab_kernels_off", default=False)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
  """Functions traced for the first time in here take XLA's own operations on CPU too.

  XLA can split these over devices, which it cannot do to a host kernel.
  """
  token = _off.set(True)
  try:
    yield
  finally:
    _off.reset(token)


def available(*arrays: jax.Array) -> bool:
  """Whether operations should choose their host kernel: decided while tracing, by the default backend.

  Args:
    *arrays: what is computed in float32 or bfloat16, so that no wider floats and no whole numbers may be among it.
  """
  narrow = all(jnp.issubdtype(a.dtype, jnp.floating) and jnp.finfo(a.dtype).bits <= 32 for a in arrays)
  return narrow and not _off.get() and jax.default_backend() == "cpu" and supported()


def reads(*arrays: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Whether a kernel may take these as they are: `available`, and all are float32 or bfloat16."""
  return available() and all(a.dtype in (jnp.float32, jnp.bfloat16) for a in arrays)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A function (item, frame) and the name, unique in the process, under which XLA knows it."""

  name: str
  function: Callable


def kernel(name: str) -> Callable[[Callable], Kernel]:
  """Decorator that makes a `Kernel` from a function (item, frame) in numba's subset of Python.

  Raises:
    TypeError: the function closes over one that numba compiled. Such a function has another identity in each process,
      so that the kernel would never be found in numba's cache; `numba.extending.register_jitable` gives one that can be
      closed over.
  """

  def made(function: Callable) -> Kernel:
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
      if isinstance(cell.cell_contents, numba.core.dispatcher.Dispatcher):
        raise TypeError(f"{variable}: got a function compiled by numba, expected a plain one registered with it")
    return Kernel(name, function)

  return made


def call(kernel: Kernel, results: Sequence[jax.ShapeDtypeStruct], *operands: jax.Array, items: int) -> list[jax.Array]:
  """Runs a kernel for every item.

  The kernel is compiled when a program that needs its results is lowered: shapes alone, or the initialisation of a
  network, compile none.

  Args:
    kernel: what to run.
    results: shapes and dtypes of the results.
    *operands: arrays of the ranks and dtypes that the kernel reads.
    items: how many times the kernel runs; a few for each core balance the load.

  Returns:
    One array per entry of `results`.
  """
  first = _compiled.bind(operands[0], kernel=kernel)
  run = jax.ffi.ffi_call(_target(kernel), list(results), vmap_method="sequential")
  return list(run(first, *operands[1:], items=np.int64(items)))


def folded(size: int, batched: Sequence[bool], *operands: jax.Array) -> list[jax.Array]:
  """For `vmap` of operands [S, ...], each of which may be alone, [1, ...], for all of the others': S times as many.

  Args:
    size: of the new axis.
    batched: which operands have it, in front.
    *operands: arrays.

  Returns:
    The operands with both axes as one; alone are those that were, and have no new axis.
  """
  count = max(a.shape[1] if new else a.shape[0] for a, new in zip(operands, batched, strict=True))

  def fold(a, new):
    if count == 1 and not new:
      return a
    a = a if new else a[None]
    return jnp.broadcast_to(a, (size, count, *a.shape[2:])).reshape(-1, *a.shape[2:])

  return list(map(fold, operands, batched))


def added(parts: jax.Array) -> jax.Array:
  """The sum over the first axis, of a few large parts or columns: XLA reduces these ten times as slowly."""
  return sum((parts[i] for i in range(1, len(parts))), start=parts[0])


def _target(kernel):
  return f"jaxlab.{kernel.name}"


@functools.cache
def _register(kernel: Kernel) -> None:
  """Compiles a kernel and its C entry point, and names it to XLA."""
  kernel.function.__qualname__ = _cached_as(kernel)
  function = numba.cfunc(types.void(_word, _word), cache=True, **_OPTIONS)(kernel.function)
  run, task = _runtime()
  handler, code = _entry(run.address, function.address, task.address)
  jax.ffi.register_ffi_target(_target(kernel), jax.ffi.pycapsule(handler), platform="cpu")
  _keep_alive.append((function, handler, code))


def _cached_as(kernel: Kernel) -> str:
  """The name under which numba's cache keeps a kernel: that of the kernel, and a digest of the code it may call.

  All functions of one name are in one index, in which two processes that compile different ones at once may exchange
  them. And the cache looks for changes in the file of the kernel alone, not in those of the modules it takes from.
  """
  return f"{kernel.name}.{_digest(sys.modules[kernel.function.__module__])}"


@functools.cache
def _digest(module: ModuleType) -> str:
  """Of the files of the modules of this package that a module refers to, and that these refer to."""
  found, waiting = {}, [module]
  while waiting:
    for value in vars(waiting.pop()).values():
      # What a package refers to depends on what has been imported.
      ours = isinstance(value, ModuleType) and value.__name__.startswith("jaxlab.") and not hasattr(value, "__path__")
      if ours and value.__name__ not in found:
        found[value.__name__] = pathlib.Path(str(value.__file__)).read_bytes()
        waiting.append(value)
  return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()[:16]


def _entry(run: int, kernel: int, task: int) -> tuple[Any, Any]:
  """The C function frame -> run(frame, kernel, task), and the code behind it: numba would take ten times as long.

  It holds the process's addresses, so it is made anew in each.
  """
  word = ir.IntType(64)
  module = ir.Module()
  module.triple = llvmlite.binding.get_process_triple()
  function = ir.Function(module, ir.FunctionType(word, [word]), "entry")
  builder = ir.IRBuilder(function.append_basic_block())
  callee = builder.inttoptr(word(run), ir.FunctionType(word, [word] * 3).as_pointer())
  builder.ret(builder.call(callee, [function.args[0], word(kernel), word(task)]))
  machine = llvmlite.binding.Target.from_default_triple().create_target_machine()
  engine = llvmlite.binding.create_mcjit_compiler(llvmlite.binding.parse_assembly(str(module)), machine)
  engine.finalize_object()
  return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("entry")), engine


@functools.cache
def _runtime():
  return numba.cfunc(_word(_word, _word, _word), cache=True)(_run), numba.cfunc(_word(_word), cache=True)(_task)


_keep_alive: list = []  # XLA holds bare addresses


# The identity, of a kernel's first operand; it is lowered, or evaluated, where the kernel is about to be.
_compiled = jex.core.Primitive("compiled")
_compiled.def_abstract_eval(lambda operand, kernel: operand)


@_compiled.def_impl
def _evaluate(operand, kernel):
  _register(kernel)
  return operand


def _lower(context, operand, kernel):
  return [_evaluate(operand, kernel)]


def _batch(operands, axes, kernel):
  return _compiled.bind(*operands, kernel=kernel), *axes


mlir.register_lowering(_compiled, _lower)
batching.primitive_batchers[_compiled] = _batch


# Memory and calls by address, for which numba's Python has no words.


@intrinsic
def words(typing_context, address):
  """The words at an address, as an unbounded array."""
  result = types.CPointer(_word)

  def codegen(context, builder, signature, args):
    return builder.inttoptr(args[0], context.get_value_type(result))

  return result(_word), codegen


@intrinsic
def fetch_add(typing_context, address, amount):
  """Adds atomically; returns the value before."""

  def codegen(context, builder, signature, args):
    place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
    return builder.atomic_rmw("add", place, args[1], "seq_cst")

  return _word(_word, _word), codegen


@intrinsic
def prefetch(typing_context, address):
  """Asks for the cache line at an address before it is needed, to read or to write."""

  def codegen(context, builder, signature, args):
    pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(args[0], pointer), number(0), number(3), number(1)])
    return context.get_dummy_value()

  return types.void(_word), codegen


def _call_address(context, builder, signature, args):
  word = ir.IntType(64)
  function = ir.FunctionType(word, [word] * (len(args) - 1))
  return builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])


@intrinsic
def _call_1(typing_context, function, argument):
  """Calls the C function at an address, as does the next."""
  return _word(_word, _word), _call_address


@intrinsic
def _call_2(typing_context, function, first, second):
  return _word(_word, _word, _word), _call_address


_malloc = types.ExternalFunction("malloc", _word(_word))
_free = types.ExternalFunction("free", types.void(_word))
_yield = types.ExternalFunction("sched_yield", types.int32())


def _view(end):
  @intrinsic(prefer_literal=True)
  def view(typing_context, frame, position, dtype, rank):
    result = types.Array(dtype.dtype, rank.literal_value, "C")

    def codegen(context, builder, signature, args):
      word = ir.IntType(64)
      if max_lanes() == 16:  # LLVM takes half a register on Intel's processors; `update` takes what it has no name for
        builder.function.attributes.update(['"prefer-vector-width"="512"'])

      def at(address, i):
        return builder.load(builder.gep(builder.inttoptr(address, word.as_pointer()), [word(i)]))

      buffer = at(at(args[0], end), position.literal_value)
      dimensions = at(buffer, _BUFFER_DIMENSIONS)
      shape = [at(dimensions, i) for i in range(result.ndim)]
      last = cgutils.alloca_once_value(builder, shape[-1])
      with cgutils.for_range_slice(builder, word(result.ndim), at(buffer, _BUFFER_RANK), word(1)) as (axis, _):
        length = builder.load(builder.gep(builder.inttoptr(dimensions, word.as_pointer()), [axis]))
        builder.store(builder.mul(builder.load(last), length), last)
      shape[-1] = builder.load(last)
      size = context.get_abi_sizeof(context.get_data_type(result.dtype))
      strides = [word(size)]
      for length in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], length))
      array = arrayobj.make_array(result)(context, builder)
      data = builder.inttoptr(at(buffer, _BUFFER_DATA), array.data.type)
      arrayobj.populate_array(array, data, shape, strides[: len(shape)], word(size), None)
      return array._getvalue()

    return result(frame, position, dtype, rank), codegen

  return view


operand, result = _view(_FRAME_OPERANDS), _view(_FRAME_RESULTS)
"""Inside a kernel, (frame, position, dtype, rank): the operand or result there; all but the frame are constants.

Of an array of higher rank, the axes from the last of `rank` on are seen as one. To flatten it before the call would be
fused into what computes it, whose loop then divides for every index."""


# Kernels see bfloat16, which numba does not have, as `types.uint16`: the upper halves of float32 numbers.
# What kernels close over is left to LLVM to inline: numba, inlining these, frees arrays that are still used.


@register_jitable(**_OPTIONS)
def same(value):
  """Inside a kernel: a number of a float32 operand or result."""
  return value


@register_jitable(**_OPTIONS)
def widened(value):
  """Inside a kernel: the number whose bits a bfloat16 operand holds."""
  return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


@numba.njit(inline="always")
def rounded(word):
  """Inside a kernel: from the bits of a float32 number those of the nearest bfloat16 one, ties to even.

  What is not a number stays so.
  """
  nearest = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
  unordered = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
  return np.uint32(0x7FC0) if unordered else np.uint32(nearest)


@register_jitable(**_OPTIONS)
def narrowed(value):
  """Inside a kernel: bits of the bfloat16 number nearest to a float32 one."""
  return types.uint16(rounded(np.float32(value).view(np.uint32)))


@register_jitable(**_OPTIONS)
def write(sums, target):
  """Inside a kernel: copies float32 numbers to a result."""
  for v in range(len(sums)):
    target[v] = sums[v]


@register_jitable(**_OPTIONS)
def write_rounded(sums, target):
  """Inside a kernel: `rounded` numbers to a bfloat16 result."""
  bits = sums.view(np.uint32)
  for v in range(len(bits)):
    target[v] = types.uint16(rounded(bits[v]))


def numbers(narrow: bool) -> tuple[types.Type, Callable, Callable]:
  """Type of operands and results that are float32, or with `narrow` bfloat16; how to read and to make one of these."""
  return (types.uint16, widened, narrowed) if narrow else (types.float32, same, same)


@numba.njit(inline="always")
def exp(x):
  """Inside a kernel: e^x of a float32 number, which loops turn into vector instructions. Relative error below 3e-7.

  2^n e^r with a whole n and a Taylor polynomial for |r| <= ln(2) / 2; the smallest normal number for x below -87, and
  x must be below 88.
  """
  x = max(x, np.float32(-87))
  n = np.floor(x * np.float32(1.442695) + np.float32(0.5))
  r = x - n * np.float32(0.6931472)
  y = np.float32(1 / 720)
  y = y * r + np.float32(1 / 120)
  y = y * r + np.float32(1 / 24)
  y = y * r + np.float32(1 / 6)
  y = y * r + np.float32(1 / 2)
  y = y * r + np.float32(1)
  y = y * r + np.float32(1)
  return y * np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)).view(np.float32)


def stepped(builder: ir.IRBuilder, step: Any) -> Callable[[Any, int], Any]:
  """Function of an address and a number i that gives the address i steps on, in the form processors add by themselves.

  Four addresses are then one register and multiples of the step.
  """
  multiples = [builder.mul(step, ir.IntType(64)(i)) for i in range(4)]

  def place(base: Any, i: int) -> Any:
    base = builder.add(base, builder.mul(step, ir.IntType(64)(i // 4 * 4))) if i >= 4 else base
    return builder.add(base, multiples[i % 4]) if i % 4 else base

  return place


class Vectors:
  """Float32 vectors at byte addresses, for inner loops that a kernel writes with LLVM's builder."""

  def __init__(self, builder: ir.IRBuilder, lanes: int):
    self.builder, self.lanes = builder, lanes
    self.type, self.bytes = ir.VectorType(ir.FloatType(), lanes), 4 * lanes

  def _place(self, address):
    return self.builder.inttoptr(address, self.type.as_pointer())

  def load(self, address):
    """The vector at an address."""
    return self.builder.load(self._place(address), align=4)

  def store(self, value, address):
    """Writes a vector."""
    self.builder.store(value, self._place(address), align=4)

  def mask(self, count):
    """Mask of the first `count` lanes."""
    counts = self.splat(count, ir.IntType(64))
    lanes = ir.Constant(ir.VectorType(ir.IntType(64), self.lanes), list(range(self.lanes)))
    return self.builder.icmp_signed("<", lanes, counts)

  def load_masked(self, address, mask):
    """The vector at an address, zero where the mask is off; only lanes that are on touch memory."""
    arguments = [self.type.as_pointer(), ir.IntType(32), mask.type, self.type]
    function = self._intrinsic("load", ir.FunctionType(self.type, arguments))
    return self.builder.call(function, [self._place(address), ir.IntType(32)(4), mask, self.zero()])

  def store_masked(self, value, address, mask):
    """Writes the lanes that are on."""
    arguments = [self.type, self.type.as_pointer(), ir.IntType(32), mask.type]
    function = self._intrinsic("store", ir.FunctionType(ir.VoidType(), arguments))
    self.builder.call(function, [value, self._place(address), ir.IntType(32)(4), mask])

  def _intrinsic(self, name, function_type):
    full = f"llvm.masked.{name}.v{self.lanes}f32.p0"
    return cgutils.get_or_insert_function(self.builder.module, function_type, full)

  def zero(self):
    """Vector of zeros."""
    return ir.Constant(self.type, [0.0] * self.lanes)

  def splat(self, value, element=None):
    """Vector of copies of a scalar."""
    kind = ir.VectorType(element or ir.FloatType(), self.lanes)
    first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.IntType(32)(0))
    return self.builder.shuffle_vector(
      first, first, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
    )

  def multiply_add(self, a, b, c):
    """a * b + c."""
    fast = ("contract",)
    return self.builder.fadd(self.builder.fmul(a, b, flags=fast), c, flags=fast)

  def registers(self, values):
    """Variables that a loop may change; LLVM turns their memory into registers."""
    places = [cgutils.alloca_once(self.builder, self.type) for _ in values]
    for place, value in zip(places, values, strict=True):
      self.builder.store(value, place)
    return places


@functools.cache
def max_lanes() -> int:
  """Float32 values in a vector: one register with AVX-512, else 8 (one register with AVX2, two with NEON)."""
  return 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8


# One call: its items are handed out one by one to the calling thread and to tasks on XLA's pool.


@numba.njit(cache=True)
def _work(block):
  shared = words(block)
  while True:
    item = fetch_add(block + 8 * _NEXT, 1)
    if item >= shared[_ITEMS]:
      break
    _call_2(shared[_KERNEL], item, shared[_FRAME])
    fetch_add(block + 8 * _FINISHED, 1)


@numba.njit(cache=True)
def _leave(block):
  # A task that the pool starts late finds no item left, but must still find the block: the last owner frees it.
  if fetch_add(block + 8 * _OWNERS, -1) == 1:
    _free(block)


def _task(block):
  _work(block)
  _leave(block)
  return 0


def _run(frame_address, kernel, task):
  frame = words(frame_address)
  if frame[_FRAME_EXTENSION] != 0:  # XLA asks which version of the interface this is
    metadata = words(words(frame[_FRAME_EXTENSION])[_EXTENSION_METADATA])
    metadata[_METADATA_VERSION] = _VERSION_MAJOR + (_VERSION_MINOR << 32)
    return 0
  items = words(words(words(frame[_FRAME_ATTRIBUTES])[0])[_SCALAR_VALUE])[0]
  api = words(frame[_FRAME_API])
  # Requests to XLA start with their size in bytes, no extension, and the context.
  request, threads = np.zeros(5, np.int64), np.ones(1, np.int64)
  request[0], request[2], request[3] = 32, frame[_FRAME_CONTEXT], threads.ctypes.data
  _call_1(api[_API_NUM_THREADS], request.ctypes.data)
  owners = max(1, min(threads[0], items))
  block = _malloc(_BLOCK_BYTES)
  shared = words(block)
  shared[_NEXT], shared[_FINISHED], shared[_OWNERS] = 0, 0, owners
  shared[_FRAME], shared[_ITEMS], shared[_KERNEL] = frame_address, items, kernel
  request[0], request[2], request[3], request[4] = 40, frame[_FRAME_CONTEXT], task, block
  for _ in range(owners - 1):
    _call_1(api[_API_SCHEDULE], request.ctypes.data)
  _work(block)
  # Items still open are running on other threads at this moment, so the wait is short and cannot deadlock.
  while fetch_add(block + 8 * _FINISHED, 0) < items:
    _yield()
  _leave(block)
  return 0
