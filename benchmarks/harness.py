"""Timing beside a peer: each side in a process of its own, the same cores for both, turn by turn.

A side is a picklable function of no arguments that sets up and returns `run`, which does the work once and blocks
until it is done. Turns alternate, A B A B, so that all meet the same load; what is reported is the median over turns,
and the ratio peer / ours: above 1 we are faster.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxlab import memory

RESULTS = pathlib.Path(__file__).parent / "RESULTS.md"
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # that decide the speed of products, best first
_HEADER = """# Benchmarks

Medians (and quartiles) of interleaved turns on the same cores. The ratio is peer / ours: above 1 jaxlab is faster.
Memory is the peak of a run over what the process held before the first. Written by `make bench`; run it on a quiet
machine. Each kind of processor has rows of its own: one with matrix units (amx_bf16) is another matter in bfloat16.

| benchmark | case | jaxlab (ms) | peer | peer (ms) | ratio | memory (MB), jaxlab / peer | machine |
|---|---|---|---|---|---|---|---|
"""

Side = Callable[[], Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Case:
  """One thing to do, by us and by peers.

  Attributes:
    name: what is done.
    ours: our side.
    peers: name -> side.
  """

  name: str
  ours: Side
  peers: Mapping[str, Side]


@dataclasses.dataclass(frozen=True)
class Measured:
  """Median seconds of a run, quartiles, and megabytes at its peak beyond those held before."""

  seconds: float
  low: float
  high: float
  megabytes: float


class _Worker:
  """A process that holds one side."""

  def __init__(self, side: Side, threads: int):
    context = multiprocessing.get_context("spawn")
    self._here, there = context.Pipe()
    self._process = context.Process(target=_serve, args=(there, side), daemon=True)
    with _cores(threads):
      self._process.start()
    there.close()  # the child's copy alone is left, so its death ends our waiting
    self._receive()

  def run(self, times: int) -> float:
    """Seconds of a run, over `times` of them."""
    self._here.send(times)
    return self._receive() / times

  def megabytes(self) -> float:
    """What runs needed so far."""
    self._here.send(0)
    return self._receive()

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.join()
    self._here.close()

  def _receive(self) -> float:
    try:
      kind, value = self._here.recv()
    except EOFError:
      self._process.join()
      raise RuntimeError(f"a side's process ended with code {self._process.exitcode}") from None
    if kind == "error":
      raise RuntimeError(value)
    return value


@contextlib.contextmanager
def _cores(count: int) -> Iterator[None]:
  """A process started in here sees this many cores: OpenMP by the variables, XLA and OpenBLAS by the affinity."""
  before, variables = os.sched_getaffinity(0), ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
  environment = {name: os.environ.get(name) for name in variables}
  try:
    os.sched_setaffinity(0, sorted(before)[:count])
    os.environ.update(dict.fromkeys(variables, str(count)))
    yield
  finally:
    os.sched_setaffinity(0, before)
    for name, value in environment.items():
      os.environ.pop(name) if value is None else os.environ.update({name: value})


def _memory(field: str) -> float:
  """Megabytes of this process: VmRSS now, VmHWM at its peak."""
  found = re.search(rf"^{field}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
  assert found is not None, field
  return int(found.group(1)) / 1024


def _serve(pipe, side):
  try:
    memory.keep()  # as `train.fit` does; for the peer too
    run = side()
    memory.trim()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak of setting up is not a run's
    before = _memory("VmRSS")
    for _ in range(3):
      run()
    pipe.send(("ready", 0.0))
    while True:
      if times := pipe.recv():
        start = time.perf_counter()
        for _ in range(times):
          run()
        pipe.send(("time", time.perf_counter() - start))
      else:
        pipe.send(("memory", _memory("VmHWM") - before))
  except EOFError:  # the parent is gone
    pass
  except Exception as error:  # the parent raises it
    pipe.send(("error", f"{type(error).__name__}: {error}"))


def measure(
  sides: Mapping[str, Side], *, turns: int = 15, threads: int = 2, turn_seconds: float = 0.1
) -> dict[str, Measured]:
  """Times sides in turn.

  Args:
    sides: name -> side.
    turns: of each.
    threads: cores that every side may use.
    turn_seconds: a side runs as often in a turn as fits.

  Raises:
    ValueError: no turns, or more threads than cores.
    RuntimeError: a side failed.
  """
  if turns < 1:
    raise ValueError(f"turns: got {turns}, expected at least 1")
  if not 1 <= threads <= len(os.sched_getaffinity(0)):
    raise ValueError(f"threads: got {threads}, expected 1 to {len(os.sched_getaffinity(0))}, the cores there are")
  with contextlib.ExitStack() as stack:
    workers = {}
    for name, side in sides.items():
      workers[name] = _Worker(side, threads)
      stack.callback(workers[name].close)
    often = {name: max(1, int(turn_seconds / worker.run(1))) for name, worker in workers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
      for name, worker in workers.items():
        time.sleep(0.02)  # a peer's threads may spin for a while after their last work
        seconds[name].append(worker.run(often[name]))
    measured = {}
    for name, worker in workers.items():
      low, middle, high = (
        statistics.quantiles(seconds[name], n=4, method="inclusive") if turns > 1 else seconds[name] * 3
      )
      measured[name] = Measured(middle, low, high, worker.megabytes())
    return measured


def run(benchmark: str, cases: list[Case], *, path: pathlib.Path = RESULTS, **options: Any) -> None:
  """Measures cases, prints them, and renews their rows for this processor in the table of results."""
  for case in cases:
    measured = measure({"jaxlab": case.ours, **case.peers}, **options)
    ours = measured.pop("jaxlab")
    rows = {}
    for peer, theirs in measured.items():
      ratio = theirs.seconds / ours.seconds
      rows[benchmark, case.name, peer, _processor()] = (
        f"| {benchmark} | {case.name} | {_spread(ours)} | {peer} | {_spread(theirs)} | {ratio:.2f} "
        f"| {ours.megabytes:.0f} / {theirs.megabytes:.0f} | {_machine(options.get('threads', 2))} |"
      )
      print(
        f"{benchmark}: {case.name}: {1000 * ours.seconds:.2f} ms, {peer} {1000 * theirs.seconds:.2f} ms, "
        f"ratio {ratio:.2f}",
        flush=True,
      )
    _update(path, rows)


def _spread(m: Measured) -> str:
  return f"{1000 * m.seconds:.3g} ({1000 * m.low:.3g} to {1000 * m.high:.3g})"


def _machine(threads: int) -> str:
  return f"{_processor()}, {threads} cores, {time.strftime('%Y-%m-%d')}"


def _processor() -> str:
  """Its model and the best of its instructions for products, on Linux; else its architecture."""
  path = pathlib.Path("/proc/cpuinfo")
  text = path.read_text() if path.exists() else ""
  model, flags = (re.search(rf"^{field}\s*: (.*)$", text, re.MULTILINE) for field in ("model name", "flags"))
  if model is None or flags is None:
    return platform.machine()
  best = next((name for name in _INSTRUCTIONS if name in flags.group(1).split()), platform.machine())
  return f"{model.group(1).strip().replace(',', ' ')} ({best})"


def _update(path: pathlib.Path, rows: dict[tuple[str, ...], str]) -> None:
  known = {}
  if path.exists():
    for line in path.read_text().splitlines():
      cells = [cell.strip() for cell in line.strip("|").split("|")]
      if len(cells) == 8 and cells[0] not in ("benchmark", "---"):
        known[cells[0], cells[1], cells[3], cells[7].split(",")[0]] = line
  known |= rows
  temporary = path.with_suffix(".tmp")
  temporary.write_text(_HEADER + "".join(known[key] + "\n" for key in sorted(known)))
  temporary.replace(path)
