"""How far ahead grain pipelines are read."""

import os
from typing import Any

import grain

# Grain's own default keeps 500 elements ready, and an element is a whole batch once a pipeline has batched.
READ_AHEAD = grain.ReadOptions(num_threads=min(8, os.cpu_count() or 1), prefetch_buffer_size=8)


def opened(dataset: Any) -> Any:
  """An iterator over anything; a grain dataset with random access is read by threads, eight batches ahead."""
  return iter(dataset.to_iter_dataset(READ_AHEAD) if isinstance(dataset, grain.MapDataset) else dataset)
