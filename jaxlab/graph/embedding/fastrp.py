"""FastRP: node embeddings without training, from a random projection of powers of the transition matrix.

    U_1 = P D^b R,   U_k = P U_{k-1},   U = standardize(sum_{k=1..q} w_k unit_rows(U_k)),   P = D^-1 S

Chen, Sultan, Tian, Chen and Skiena, "Fast and Accurate Network Embeddings via Very Sparse Random Projection", CIKM
2019, arXiv:1908.11512; code `GTmac/FastRP`. Symbols: S [N, N] is `operator`, D its row sums, R [N, dim] `projection`,
w `weights`, b `degree_exponent` (the paper's beta). Rows of U resemble each other as rows of sum_k w_k P^k D^b do, yet
no power is ever formed: q sparse products take O(q E dim) operations, and the running sum O(N dim) memory.

    s = sparse.from_scipy(adjacency)
    u = fastrp.embed(s, fastrp.projection(jax.random.key(0), s.shape[0], 512))

| variant | projection | embed |
|---|---|---|
| FastRP | "sparse" | weights (0, 0, 1, w) with w and b tuned on a few labels; the defaults are for BlogCatalog |
| Gaussian | "gaussian" | the same |
| RandNE without its hop 0 | "orthogonal" | rising weights, "adjacency", b = 0, `normalize=False` |
| concatenation | any | `combine(powers(...), None)` |

To tune the weights, compute `powers` once; each choice is then one cheap `combine`.

Differs from the paper: D is not divided by 2m, a factor that standardization removes. Differs from the official code:
every option works with every other; a column that is constant up to rounding becomes zero. As there, a node without
edges has rows of zeros before standardization, so all such nodes share one embedding.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxlab import checks
from jaxlab.graph import sparse

Kind = Literal["sparse", "gaussian", "orthogonal"]
Similarity = Literal["transition", "adjacency"]


def projection(
  key: PRNGKeyArray, n: int, dim: int, kind: Kind = "sparse", *, dtype: jax.typing.DTypeLike = "float32"
) -> Float[Array, "n dim"]:
  """A random matrix R with E[R R^T] = I: products of its rows keep products of vectors up to about 1 / sqrt(dim).

  Args:
    key: the randomness.
    n: N, nodes.
    dim: columns.
    kind: "sparse": entries 0 but for a share 1 / sqrt(N), which is +-N^(1/4) / sqrt(dim); "gaussian": N(0, 1 / dim);
      "orthogonal": Gaussian made orthogonal, columns of length sqrt(N / dim), dim <= N.
    dtype: of the result, floating.

  Raises:
    ValueError: an argument out of range.

  Source: section 3.2 and Li, Hastie and Church, "Very sparse random projections", KDD 2006.
  """
  checks.choice("kind", kind, Kind)
  for name, value in (("n", n), ("dim", dim)):
    checks.count(name, value)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype: got {jnp.dtype(dtype)}, expected a floating one")
  if kind == "sparse":
    density = n**-0.5
    uniform = jax.random.uniform(key, (n, dim))
    sign = jnp.where(uniform < density / 2, -1, 1) * (uniform < density)
    return (sign * (density * dim) ** -0.5).astype(dtype)
  normal = jax.random.normal(key, (n, dim))
  if kind == "gaussian":
    return (normal * dim**-0.5).astype(dtype)
  if dim > n:
    raise ValueError(f"dim: got {dim}, expected at most {n}, the number of nodes, for orthogonal columns")
  q, r = jnp.linalg.qr(normal)
  # QR fixes signs by its own rule; with a positive diagonal of r, q is uniform over orthogonal frames.
  return (q * jnp.where(jnp.diagonal(r) < 0, -1, 1) * (n / dim) ** 0.5).astype(dtype)


def embed(
  operator: sparse.Operator,
  projection: Float[Array, "n dim"],
  *,
  weights: Sequence[float] | Float[Array, " q"] = (0.0, 0.0, 1.0, 6.67),
  similarity: Similarity = "transition",
  degree_exponent: float | Float[Array, ""] = -0.64,
  normalize: bool = True,
) -> Float[Array, "n dim"]:
  """Embeds every node, in the dtype of `projection`; sums are in float32 (float64 for float64).

  Args:
    operator: S, adjacency with finite weights >= 0, as of `sparse.from_scipy` or `sparse.operator`. A walk goes from
      row to column: pass `sparse.transpose(sparse.operator(graph))` to follow the edges of a directed graph.
    projection: R, as of `projection`.
    weights: [q] of the powers 1 to q.
    similarity: "transition": P = D^-1 S; "adjacency": P = S.
    degree_exponent: b in [-1, 0]; -1 counts neighbours by rarity, 0 by number of walks.
    normalize: scale each row of each power to length 1 before weighting.

  Returns:
    [N, dim]; each column has mean 0 and standard deviation 1, or is 0 if it was constant.

  Raises:
    ValueError: an argument of another shape, kind or range. Weights, of powers and of edges, are checked on the host
      only; traced ones that are not finite give columns of NaN.
  """
  w = _check_weights(weights)
  p, u = _start(operator, projection, similarity, degree_exponent)

  def hop(carry, weight):
    u, total = carry
    u = sparse.propagate(p, u)
    return (u, total + weight * (unit_rows(u) if normalize else u)), None

  total = jnp.zeros(u.shape, p.dtype)
  (_, total), _ = jax.lax.scan(hop, (u, total), w.astype(p.dtype))
  return standardize(total).astype(u.dtype)


def powers(
  operator: sparse.Operator,
  projection: Float[Array, "n dim"],
  hops: int = 4,
  *,
  similarity: Similarity = "transition",
  degree_exponent: float | Float[Array, ""] = -0.64,
  normalize: bool = True,
) -> Float[Array, "q n dim"]:
  """U_1 to U_q, with rows of length 1 if `normalize`: q times the memory of `embed`, for `combine`. Arguments as there.

  Args:
    hops: q.
  """
  checks.count("hops", hops)
  p, u = _start(operator, projection, similarity, degree_exponent)

  def hop(u, _):
    u = sparse.propagate(p, u)
    return u, unit_rows(u) if normalize else u

  return jax.lax.scan(hop, u, length=hops)[1]


def combine(
  powers: Float[Array, "q n dim"], weights: Sequence[float] | Float[Array, " q"] | None
) -> Float[Array, "n columns"]:
  """The embedding from `powers`: [N, dim] as `embed` makes it, or all powers side by side [N, q dim] for None.

  Raises:
    ValueError: another number of weights than of powers, or weights that are not finite (checked on the host only).
  """
  if powers.ndim != 3:
    raise ValueError(f"powers: got shape {powers.shape}, expected [q, N, dim]")
  if weights is None:
    return jnp.concatenate(list(powers), axis=1)
  w = _check_weights(weights)
  if len(w) != len(powers):
    raise ValueError(f"weights: got {len(w)}, expected {len(powers)}, one for each power")
  wide = jnp.promote_types(powers.dtype, "float32")
  total = jnp.einsum("k,knd->nd", w.astype(wide), powers.astype(wide), precision="highest")
  return standardize(total).astype(powers.dtype)


def unit_rows(x: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
  """Rows scaled to length 1; rows of zeros stay. Computed in float32 at least."""
  wide = x.astype(jnp.promote_types(x.dtype, "float32"))
  # Squares of a large or small power of S leave the range of float32; those of entries up to 1 do not.
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=1, keepdims=True))
  wide /= jnp.where(largest > 0, largest, 1)
  squared = jnp.sum(wide**2, axis=1, keepdims=True)
  return (wide * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1))).astype(x.dtype)


def standardize(x: Float[Array, "n dim"]) -> Float[Array, "n dim"]:
  """Columns shifted to mean 0 and scaled to (population) standard deviation 1; constant ones become 0, NaN stays."""
  mean = jnp.mean(x, axis=0)
  centered = x - mean
  centered -= jnp.mean(centered, axis=0)  # what rounding of the first mean left
  std = jnp.sqrt(jnp.mean(centered**2, axis=0))
  varies = ~(std <= 10 * jnp.finfo(x.dtype).eps * jnp.abs(mean))  # true of NaN
  return jnp.where(varies, centered / jnp.where(varies, std, 1), 0)


def _start(operator, projection, similarity, degree_exponent):
  """P, and D^b R in the dtype of R."""
  _check(operator, projection, similarity, degree_exponent)
  wide = jnp.promote_types(projection.dtype, "float32")
  values = operator.values.astype(wide)
  p = operator.replace_values(values)
  degree = sparse.propagate(p, jnp.ones(p.shape[1], wide))
  # 1/0 and 0^b are 0: nodes without edges neither send nor receive.
  some = degree > 0
  degree = jnp.where(some, degree, 1)
  if similarity == "transition":
    p = p.replace_values(values * jnp.where(some, 1 / degree, 0)[p.rows])
  scale = jnp.where(some, degree**degree_exponent, 0)
  return p, (scale[:, None] * projection).astype(projection.dtype)


def _check(operator, projection, similarity, degree_exponent):
  if not isinstance(operator, sparse.Operator):
    raise ValueError(f"operator: got a {type(operator).__name__}, expected a sparse.Operator; see sparse.from_scipy")
  n = operator.shape[0]
  if operator.shape != (n, n):
    raise ValueError(f"operator: got shape {operator.shape}, expected a square one")
  if not isinstance(operator.values, jax.core.Tracer):
    values = np.asarray(operator.values)
    bad = values[~(np.isfinite(values) & (values >= 0))]
    if bad.size:
      raise ValueError(f"operator: got a weight {bad[0]}, expected finite numbers of at least 0")
  if projection.ndim != 2 or projection.shape[0] != n:
    raise ValueError(f"projection: got shape {projection.shape}, expected [{n}, dim], one row for each node")
  if not jnp.issubdtype(projection.dtype, jnp.floating):
    raise ValueError(f"projection: got dtype {projection.dtype}, expected a floating one")
  checks.choice("similarity", similarity, Similarity)
  if not isinstance(degree_exponent, jax.core.Tracer) and not -1 <= degree_exponent <= 0:
    raise ValueError(f"degree_exponent: got {degree_exponent}, expected a number in [-1, 0]")


def _check_weights(weights):
  w = jnp.asarray(weights)
  if w.ndim != 1 or not w.size:
    raise ValueError(f"weights: got shape {w.shape}, expected one for each power, [q] with q at least 1")
  # Not of w, which jit traces even where weights are numbers.
  traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(weights))
  if not traced and not np.isfinite(np.asarray(weights)).all():
    raise ValueError(f"weights: got {weights}, expected finite numbers")
  return w
