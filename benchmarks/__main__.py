"""``python -m benchmarks NAME …`` runs ``benchmarks/NAME.py``; without a name it lists the benchmarks."""

import pkgutil
import runpy
import sys

import benchmarks

# shared by the benchmarks, nothing to run
_SHARED = (
    "common",
    "fake_gpu",
    "fake_step",
    "file_operations",
    "loopback",
    "many_runs",
    "paged",
    "peers",
    "official_code",
    "official_literal",
    "official_methods",
    "store_traffic",
    "whole_set",
    "__main__",
)


def main() -> int:
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in _SHARED)
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        problem = f"There is no benchmark {sys.argv[1]!r}. " if len(sys.argv) > 1 else ""
        print(f"{problem}Choose one of {', '.join(names)}; NAME --help lists its options.", file=sys.stderr)
        return 2
    name = sys.argv.pop(1)
    sys.argv[0] = f"benchmarks.{name}"
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
