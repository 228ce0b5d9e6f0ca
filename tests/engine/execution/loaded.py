"""One rank of several loads its shard, and says how much memory that took at most.

Run by `test_rank` with MODEL RANK RANKS; the others of its crew are not needed for loading.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from engine import load_config
from engine.execution.memory import private_memory
from engine.execution.rank import Rank
from engine.weights.checkpoint import open_checkpoint
from kernels.collectives import Place, shared_memory


def main() -> None:
    path, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    config = load_config(values={"model.keep_packed": False, "execution.threads": 1})
    place = Place(rank, ranks, shared_memory())
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, private_memory())

    # A first one, so that what the libraries take at their first use is not counted.
    Rank(config, open_checkpoint(Path(sys.argv[4])), place, lambda *_: None)
    before = private_memory()
    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = Rank(config, open_checkpoint(path, texts=False), place, lambda *_: None)
    done.set()
    watcher.join()
    print(json.dumps({"weights": loaded.facts.weights, "peak": peak - before}))


if __name__ == "__main__":
    main()
