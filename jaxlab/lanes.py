"""Arithmetic on vectors of 16 floats, for host kernels that are written with LLVM's builder."""

import math

from llvmlite import ir
from numba.core import cgutils

from jaxlab import kernels

LANES = 16  # one register with AVX-512, two with AVX2
WORD = ir.IntType(64)


class Lanes(kernels.Vectors):
  """Vectors of `LANES` floats. Addresses are in bytes."""

  def __init__(self, builder: ir.IRBuilder):
    super().__init__(builder, LANES)

  def constant(self, value: float) -> ir.Constant:
    """Vector of copies of a number."""
    return ir.Constant(self.type, [value] * LANES)

  def add(self, a, b):
    """a + b."""
    return self.builder.fadd(a, b, flags=("contract",))

  def mul(self, a, b):
    """a * b."""
    return self.builder.fmul(a, b, flags=("contract",))

  def at(self, address, index, size):
    """address + index * size, the last being a number or a value."""
    return self.builder.add(address, self.builder.mul(index, WORD(size) if isinstance(size, int) else size))

  def scalar(self, address, index):
    """Vector of copies of the float at an index."""
    place = self.builder.inttoptr(self.at(address, index, 4), ir.FloatType().as_pointer())
    return self.splat(self.builder.load(place))

  def integer(self, address, index):
    """The int32 at an index, as a word."""
    place = self.builder.inttoptr(self.at(address, index, 4), ir.IntType(32).as_pointer())
    return self.builder.sext(self.builder.load(place), WORD)

  def exp2(self, x):
    """2^x and 2^x - 1 to float32's precision, x clipped to [-126, 126]; NaN of NaN."""
    given = x
    x = self._call("minnum", self._call("maxnum", x, self.constant(-126.0)), self.constant(126.0))
    whole = self._call("floor", self.builder.fadd(x, self.constant(0.5)))
    f = self.builder.fsub(x, whole)
    power = self.constant(math.log(2) ** 6 / 720)  # 2^f - 1 = sum_i (ln 2)^i / i! f^i, to 2e-7 for |f| <= 1/2
    for i in range(5, 0, -1):
      power = self.multiply_add(power, f, self.constant(math.log(2) ** i / math.factorial(i)))
    power = self.mul(power, f)
    integers = ir.VectorType(ir.IntType(32), LANES)
    exponent = self.builder.add(self.builder.fptosi(whole, integers), ir.Constant(integers, [127] * LANES))
    scale = self.builder.bitcast(self.builder.shl(exponent, ir.Constant(integers, [23] * LANES)), self.type)
    less_one = self.builder.fsub(scale, self.constant(1.0))
    # The clipping would make a number of it. Compared as bits, since fast arithmetic knows no NaN.
    bits = self.builder.and_(self.builder.bitcast(given, integers), ir.Constant(integers, [0x7FFFFFFF] * LANES))
    nan = self.builder.icmp_signed(">", bits, ir.Constant(integers, [0x7F800000] * LANES))
    results = self.multiply_add(scale, power, scale), self.multiply_add(scale, power, less_one)
    return tuple(self.builder.select(nan, given, result) for result in results)

  def sigmoid(self, x):
    """1 / (1 + exp(-x))."""
    power, _ = self.exp2(self.mul(x, self.constant(-1 / math.log(2))))
    return self.builder.fdiv(self.constant(1.0), self.add(power, self.constant(1.0)))

  def _call(self, name, *arguments):
    function = ir.FunctionType(self.type, [self.type] * len(arguments))
    name = f"llvm.{name}.v{LANES}f32"
    return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), arguments)
