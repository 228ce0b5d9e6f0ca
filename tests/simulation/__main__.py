"""`python -m tests.simulation --steps N --seed S`: ends non-zero, and says how to see it again."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.run import Broken, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.simulation", description=__doc__)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    parser.add_argument("--episodes", type=int, default=None, help="stop after as many")
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        report = simulate(arguments.steps, arguments.seed, arguments.episodes)
    except Broken as broken:
        print(f"broken: {broken}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(f"{report.steps} steps in {report.episodes} episodes hold, {seconds:.1f} s")
    print(", ".join(f"{name} {count}" for name, count in sorted(report.outcomes.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
