"""Table of whole answers right by length: `python benchmarks/lengths.py FOLDER ...`.

Reads what `python run.py --out FOLDER` left: open targets and made-up names, after all edits, by
the tokens of the target.
"""

import json
import sys
from pathlib import Path

LONGEST = 9  # tokens; longer targets count with these
QUERIES = {"reliability": "Rel", "text_generality": "T-Gen", "modal_generality": "M-Gen"}


def by_length(predictions: list[dict], query: str) -> dict[int, list[float]]:
    """Group the free-running scores of one query by the tokens of its target, without the end."""
    last = max(line["edits"] for line in predictions)
    scores: dict[int, list[float]] = {}
    for line in predictions:
        chosen = line["edits"] == last and line["query"] == query
        if chosen and line["kind"] in ("open", "novel_names"):
            scores.setdefault(min(line["tokens"], LONGEST), []).append(line["free_running"])
    return scores


def main() -> None:
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    lengths = range(1, LONGEST + 1)
    names = [*map(str, lengths[:-1]), f"{LONGEST} or more", "all"]
    print("| rank | query | " + " | ".join(names) + " |")
    print("|---" * (len(lengths) + 3) + "|")
    for folder in map(Path, sys.argv[1:]):
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        predictions = [json.loads(line) for line in lines]
        rank = json.loads((folder / "metrics.json").read_text())["config"]["rank"]
        for query, name in QUERIES.items():
            scores = by_length(predictions, query)
            cells = [scores.get(n, []) for n in lengths]
            cells.append([score for values in scores.values() for score in values])
            shares = [f"{100 * sum(cell) / len(cell):.0f}" if cell else "-" for cell in cells]
            print(f"| {rank} | {name} | " + " | ".join(shares) + " |")
    print("| | n | " + " | ".join(str(len(cell)) for cell in cells) + " |")


if __name__ == "__main__":
    main()
