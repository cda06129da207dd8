"""Peak memory of a fira of 30 million parameters on 2 and 4 ranks, compared with DDP and FSDP2.

    python -m benchmarks.memory.run [ROUNDS]

ROUNDS: of the step times, in which the contenders alternate; 0: no step times. Writes results.csv.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import environment, merge

HERE = Path(__file__).parent


def main() -> None:
    print(environment(), "load", os.getloadavg()[0])
    rounds = sys.argv[1] if len(sys.argv) > 1 else "5"
    for ranks in (2, 4):
        command = ["mpirun", "-np", str(ranks), sys.executable, "-m", "benchmarks.memory.ranks", rounds]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        lines = [line.removeprefix("row:") for line in result.stdout.splitlines() if line.startswith("row:")]
        table = merge(HERE / "results.csv", [json.loads(line) for line in lines], ["ranks", "contender"])
    print(table.to_string(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main()
