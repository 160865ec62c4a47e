"""Run the benchmarks that leave results, on the tiny LLaVA: `python benchmarks/everything.py`.

    python benchmarks/everything.py --small     minutes: do they run? The figures mean nothing
    python benchmarks/everything.py             hours on 2 CPU cores

Results go to output/benchmarks/; most scripts go on from those that are there. At full size LoRA
needs `pip install --no-deps -r benchmarks/requirements.txt`. Ends at the first script that fails.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EDITOR = ["--editor", "tiny-llava/editor"]
# It needs a package more.
WITHOUT_LORA = ["--methods", "none", "LiveEdit", "lookup", "in context (RAG)", "FT-L", "FT-BF"]
WITHOUT_LORA += ["GRACE, fixed radius"]
# Arguments at full size, and at a small one.
BENCHMARKS = {
    "peers": (
        [*EDITOR, "--tuning-edits", "100"],
        [*EDITOR, "--tuning-edits", "0", "--edits", "4", "--counts", "2", "4"]
        + ["--seeds", "0", "--half", *WITHOUT_LORA],
    ),
    "ablations": ([*EDITOR, "--edits", "250"], [*EDITOR, "--edits", "5"]),
    "robustness": ([*EDITOR, "--edits", "250"], [*EDITOR, "--edits", "5"]),
    "scale": (EDITOR, [*EDITOR, "--edits", "6", "12", "--asked", "4"]),
    "variants": (
        ["--parts", "--transfer", "--ranks", "1", "2", "4", "8"]
        + ["--layers", "0", "1", "3", "4", "5"]
        + ["--", "--train-steps", "200", "--train-samples", "6400", "--edits", "100"],
        ["--ranks", "1", "--", "--train-steps", "2", "--train-samples", "80", "--edits", "4"],
    ),
    "speed": (EDITOR, [*EDITOR, "--edits", "0", "10"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="only see that they run")
    small = parser.parse_args().small
    folder = ROOT / "output" / ("benchmarks-small" if small else "benchmarks")
    for name, sizes in BENCHMARKS.items():
        result = folder / f"{name}.json"
        if small:
            result.unlink(missing_ok=True)  # some go on where their results end
        command = [sys.executable, f"benchmarks/{name}.py", "--out", str(result), *sizes[small]]
        began = time.time()
        subprocess.run(command, cwd=ROOT, check=True)
        print(f"{name}: {time.time() - began:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
