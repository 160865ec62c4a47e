"""Edit thousands of facts, and ask the same questions about the first of them again and again.

    python benchmarks/scale.py --editor tiny-llava/editor    five minutes on 2 CPU cores
    python benchmarks/scale.py --table FILE

The held-out scenes have room for about 1,250 edits, so the world is drawn in twice as many colors:
model and editor have never seen the new ones. Writes scale.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
from data import Scene, drawn_samples, split_scenes
from liveedit import LiveEdit
from run import ask_all, judge, load_model, longest_answer, question, report_row

# fmt: off
NEW_COLORS = {
    "maroon": (110, 10, 30), "salmon": (240, 130, 110), "gold": (205, 165, 30),
    "beige": (225, 210, 170), "olive": (120, 125, 35), "lime": (150, 235, 60),
    "mint": (150, 230, 185), "teal": (10, 120, 120), "navy": (15, 20, 95),
    "lavender": (190, 170, 240), "magenta": (220, 40, 170), "silver": (190, 195, 200),
}
COLUMNS = {
    "reliability": "Rel", "text_generality": "T-Gen", "modal_generality": "M-Gen",
    "modal_locality": "M-Loc", "average": "Average", "same_image": "Same img",
    "similar_image": "Similar",
}
# fmt: on


def wide_stream(edits: int, seed: int) -> list[data.EditSample]:
    """Edits of scenes that no training of the editor has seen, in old and new colors."""
    trained = set(split_scenes()[0])
    data.COLORS.update(NEW_COLORS)  # pictures are drawn by it
    scenes = [
        Scene(shape, color, background)
        for shape in data.SHAPES
        for color in data.COLORS
        for background in data.COLORS
        if color != background
    ]
    scenes = [scene for scene in scenes if scene not in trained]
    return drawn_samples(edits, scenes, f"scale {seed}", held_out=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--editor", type=Path, default=ROOT / "output" / "editor")
    parser.add_argument("--edits", type=int, nargs="+", default=[200, 500, 1000, 5000])
    parser.add_argument("--asked", type=int, default=200, help="edits that are asked about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "scale.json")
    parser.add_argument("--table", type=Path, help="print the table of these results only")
    given = parser.parse_args()
    if given.table:
        print(markdown(json.loads(given.table.read_text())))
        return
    if given.asked > min(given.edits):
        sys.exit(f"scale.py: --asked {given.asked} is more than the first of --edits has")
    model, processor = load_model(given.model, "cpu", "auto")
    try:
        editor = LiveEdit.from_pretrained(model, processor, given.editor)
    except (OSError, ValueError) as error:
        sys.exit(f"scale.py: {error}")
    editor.reset()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    stream = wide_stream(max(given.edits), given.seed)
    asked, batch_size = stream[: given.asked], max(4, 2**14 // editor.norm.weight.numel())
    longest = longest_answer(editor, asked)
    before = ask_all(editor, asked, longest, batch_size)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results = {"model": given.model, "seed": given.seed, "versions": versions, "rows": []}
    for count in sorted(given.edits):
        began, fresh = time.time(), stream[len(editor.experts) : count]
        editor.edit_many([question(sample.edit) for sample in fresh], batch_size)
        editing, began = time.time() - began, time.time()
        after, judged = ask_all(editor, asked, longest, batch_size), []
        for sample, edit in zip(asked, editor.edits()[: given.asked], strict=True):
            judged += judge(sample, edit.id, count, before, after)
        row = report_row(count, judged) | {"seconds_per_edit": editing / len(fresh)}
        results["rows"].append(row | {"seconds_of_asking": time.time() - began})
        given.out.write_text(json.dumps(results, indent=1))
        print(count, {name: round(row["free_running"][name], 1) for name in COLUMNS}, flush=True)
    print(markdown(results))


def markdown(results: dict) -> str:
    """Print teacher-forced and free-running figures, one row for each number of edits."""
    lines = []
    for way in ("teacher_forced", "free_running"):
        lines.append(f"| {way.replace('_', '-')} | " + " | ".join(COLUMNS.values()) + " |")
        lines.append("|---" * (len(COLUMNS) + 1) + "|")
        for row in results["rows"]:
            cells = " | ".join(f"{row[way][name]:.1f}" for name in COLUMNS)
            lines.append(f"| {row['edits']} edits | {cells} |")
        lines.append("")
    return "\n".join(lines[:-1])


if __name__ == "__main__":
    main()
