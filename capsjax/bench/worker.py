"""The process of one repetition: ``python -m capsjax.bench.worker REQUEST RESULT``.

It reads what to measure from one file and writes what it found, or why not, to the other.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(request: Path, result: Path) -> None:
    """Measures what a file asks for."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    # Only now: how long importing takes belongs to the first stage.
    from capsjax.bench.environment import read_environment
    from capsjax.bench.measuring import Stages, Wanted, measure
    from capsjax.bench.roofline import measure_roofline
    from capsjax.bench.rows import plain
    from capsjax.bench.targets import parse_target
    from capsjax.bench.workloads import make_workload

    stages = Stages(asked["begun"])
    found: dict[str, Any] = {}
    try:
        target = parse_target(asked["target"])
        if asked["workload"] == "roofline":
            found["roofline"] = measure_roofline(target.devices())
        else:
            workload = make_workload(asked["workload"], asked["parameters"])
            wanted = Wanted(
                cache=Path(asked["cache"]),
                analyse=asked["analyse"],
                run_seconds=asked["run_seconds"],
                texts=Path(asked["texts"]) if asked["texts"] else None,
            )
            found |= measure(workload, target, wanted, stages)
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        found["error"] = {
            "stage": stages.current,
            "type": type(error).__name__,
            "message": text.splitlines()[0],
        }
    found["environment"] = read_environment()
    stages.end("finish", then="exit")
    found["stages"] = stages.seconds
    found["ended"] = time.time()
    result.write_text(json.dumps(plain(found)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    # All is written; taking Python and XLA apart would take most of a second.
    os._exit(0)
