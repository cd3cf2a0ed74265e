"""The 28 orbit adjacencies of a pair (i, j) from six sums over its common neighbours: one text for both backends.

With A the adjacency, d degrees, P = A A and T = A * P (triangles on an edge; `*` is elementwise), the six are

    common   P_ij                        common neighbours
    degrees  (A diag(d) A)_ij            their degrees, summed
    near     (T A)_ij                    triangles on their edges to i
    far      (A T)_ij                    triangles on their edges to j
    inner    E_ij                        edges among them
    walks    (A A A)_ij                  walks of three steps (needed on edges only)

Every sum is at most the number of entries of A, that is twice the number of edges: so they are exact in int32 while A
has fewer than 2^31 entries, and in float32 up to 2^24. Products of two of them need more; on the host they are int64.

The functions are plain arithmetic on integers: numba compiles them for scalars, JAX traces them for whole matrices.
"""

OrbitPair = tuple[int, int, int]  # hop, orbit of the row's node, orbit of the column's

HOP_1: tuple[OrbitPair, ...] = (
  (1, 0, 0), (1, 1, 2), (1, 2, 1), (1, 3, 3), (1, 4, 5), (1, 5, 4), (1, 5, 5), (1, 6, 7), (1, 7, 6), (1, 8, 8),
  (1, 9, 11), (1, 11, 9), (1, 10, 10), (1, 10, 11), (1, 11, 10), (1, 12, 13), (1, 13, 12), (1, 13, 13), (1, 14, 14),
)  # fmt: skip
HOP_2: tuple[OrbitPair, ...] = (
  (2, 1, 1), (2, 4, 5), (2, 5, 4), (2, 6, 6), (2, 8, 8), (2, 9, 10), (2, 10, 9), (2, 12, 12),
)  # fmt: skip
HOP_3: tuple[OrbitPair, ...] = ((3, 4, 4),)
ORBIT_PAIRS = HOP_1 + HOP_2 + HOP_3

# Orbits of graphlets G0 to G8.
GRAPHLETS = ((0,), (1, 2), (3,), (4, 5), (6, 7), (8,), (9, 10, 11), (12, 13), (14,))

# No simple path over all nodes of the graphlet joins these two places.
INVISIBLE_TO_PATHS: tuple[OrbitPair, ...] = (
  (1, 1, 2), (1, 2, 1), (1, 4, 5), (1, 5, 4), (1, 5, 5), (1, 6, 7), (1, 7, 6), (1, 9, 11), (1, 11, 9), (1, 10, 10),
  (1, 10, 11), (1, 11, 10), (1, 13, 13), (2, 4, 5), (2, 5, 4), (2, 6, 6), (2, 8, 8),
)  # fmt: skip


def linked(common, degrees, near, far, inner, walks, d_i, d_j, triangles_i, triangles_j, open_i, open_j):
  """Entries of `HOP_1` at an edge (i, j).

  Args:
    common: as above, also the next five.
    degrees: "
    near: "
    far: "
    inner: "
    walks: "
    d_i: degree of i.
    d_j: degree of j.
    triangles_i: row sum of T, twice the triangles of i.
    triangles_j: likewise.
    open_i: paths i - a - b without the edge i - b: the sum over neighbours a of d_a - 1 - T_ia.
    open_j: likewise.
  """
  only_i, only_j = d_i - 1 - common, d_j - 1 - common  # neighbours of i that are none of j, and of j
  a1213, a1312 = far - common - 2 * inner, near - common - 2 * inner
  a88 = walks - d_i - d_j + 1 - near - far + 2 * (common + inner)
  a911, a119 = triangles_j // 2 - far + inner, triangles_i // 2 - near + inner
  return (
    common * 0 + 1,  # 1 in the type of the others
    only_j,
    only_i,
    common,
    open_j - (degrees - common - far) - only_i - a88,
    open_i - (degrees - common - near) - only_j - a88,
    only_i * only_j - a88,
    only_j * (only_j - 1) // 2 - a911,
    only_i * (only_i - 1) // 2 - a119,
    a88,
    a911,
    a119,
    degrees - near - far + 2 * inner,
    common * only_j - a1213,
    common * only_i - a1312,
    a1213,
    a1312,
    common * (common - 1) // 2 - inner,
    inner,
  )


def apart(common, degrees, near, far, inner, d_i, d_j):
  """Entries of `HOP_2` at two nodes (i, j) that have common neighbours and no edge. Arguments as `linked`."""
  a88 = common * (common - 1) // 2 - inner
  return (
    common,
    (d_j - 1) * common - far - 2 * a88,
    (d_i - 1) * common - near - 2 * a88,
    degrees - 2 * common - near - far + 2 * inner,
    a88,
    far - 2 * inner,
    near - 2 * inner,
    inner,
  )
