"""`python -m benchmarks [names]`: runs the benchmarks of those names, or all."""

import argparse
import importlib
import pathlib

from benchmarks import harness

_NAMES = sorted(p.stem for p in pathlib.Path(__file__).parent.glob("[a-z]*.py") if p.stem != "harness")


def main() -> None:
  """Runs what the command line names; each benchmark is a module with `cases()`."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
  parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(_NAMES)}; default all")
  parser.add_argument("--only", default="", help="cases whose name contains this")
  parser.add_argument("--turns", type=int, default=15, help="turns of each side")
  parser.add_argument("--threads", type=int, default=2, help="cores that each side may use")
  args = parser.parse_args()
  unknown = sorted(set(args.names) - set(_NAMES))
  if unknown:
    parser.error(f"name: got {', '.join(unknown)}, expected some of {', '.join(_NAMES)}")
  for name in args.names or _NAMES:
    cases = [case for case in importlib.import_module(f"benchmarks.{name}").cases() if args.only in case.name]
    harness.run(name, cases, turns=args.turns, threads=args.threads)


if __name__ == "__main__":
  main()
