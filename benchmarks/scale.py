"""Edit thousands of facts, and ask the same questions about the first of them again and again.

    python benchmarks/scale.py --editor tiny-llava/editor    two minutes on one thread
    python benchmarks/scale.py --table FILE

The held-out scenes have room for about 1,250 edits, so the world is drawn in twice as many colors,
of which model and editor have never seen half. A bigger world is a thinner one, too: "crowded" is
the share of Similar queries whose scene is itself edited. Writes scale.json.
"""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import drawn
from benchmarks.common import (
    COLUMNS,
    ask_before,
    open_results,
    options_of,
    percent,
    sentinel_alone,
    table,
    trained_editor,
)
from data import EditSample
from drawn import Scene, drawn_samples, split_scenes
from run import ask_all, judge, load_model, question, report_row

# fmt: off
NEW_COLORS = {
    "maroon": (110, 10, 30), "salmon": (240, 130, 110), "gold": (205, 165, 30),
    "beige": (225, 210, 170), "olive": (120, 125, 35), "lime": (150, 235, 60),
    "mint": (150, 230, 185), "teal": (10, 120, 120), "navy": (15, 20, 95),
    "lavender": (190, 170, 240), "magenta": (220, 40, 170), "silver": (190, 195, 200),
}
# fmt: on


def wide_stream(edits: int, seed: int) -> list[EditSample]:
    """Edits of scenes that no training of the editor has seen, in old and new colors."""
    trained = set(split_scenes()[0])
    drawn.COLORS.update(NEW_COLORS)  # pictures are drawn by it
    scenes = [
        Scene(shape, color, background)
        for shape in drawn.SHAPES
        for color in drawn.COLORS
        for background in drawn.COLORS
        if color != background
    ]
    scenes = [scene for scene in scenes if scene not in trained]
    return drawn_samples(edits, scenes, f"scale {seed}", held_out=True)


def crowded(asked: list[EditSample], edited: list[EditSample]) -> float:
    """Tell how many of the Similar queries are about a scene that is edited too, in per cent."""
    scenes = {sample.edit.image.scene for sample in edited}
    return percent(sample.queries["similar_image"].image.scene in scenes for sample in asked)


def main() -> None:
    parser = options_of(__doc__, "scale.json")
    parser.add_argument("--edits", type=int, nargs="+", default=[200, 1000, 2500, 5000])
    parser.add_argument("--asked", type=int, default=200, help="edits that are asked about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sentinel-alone", action="store_true", help="filter as in the paper")
    given = parser.parse_args()
    if given.table:
        print(markdown(json.loads(given.table.read_text())))
        return
    if given.asked > min(given.edits):
        sys.exit(f"scale.py: --asked {given.asked} is more than the first of --edits has")
    editor = trained_editor(*load_model(given.model, "cpu", "auto"), given.editor)
    if given.sentinel_alone:
        sentinel_alone(editor)
    settings = {name: getattr(given, name) for name in ("model", "asked", "seed", "sentinel_alone")}
    results = open_results(given.out, settings) | {"rows": []}
    stream = wide_stream(max(given.edits), given.seed)
    asked, batch_size = stream[: given.asked], max(4, 2**14 // editor.norm.weight.numel())
    before = ask_before(editor, asked, batch_size)
    for count in sorted(given.edits):
        began, fresh = time.time(), stream[len(editor.experts) : count]
        editor.edit_many([question(sample.edit) for sample in fresh], batch_size)
        editing, began = time.time() - began, time.time()
        after, judged = ask_all(editor, asked, batch_size), []
        for sample, edit in zip(asked, editor.edits()[: given.asked], strict=True):
            judged += judge(sample, edit.id, count, before, after)
        row = report_row(count, judged) | {"seconds_per_edit": editing / len(fresh)}
        row |= {"seconds_of_asking": time.time() - began, "crowded": crowded(asked, stream[:count])}
        results["rows"].append(row)
        given.out.write_text(json.dumps(results, indent=1))
        print(f"{count} edits: {row['seconds_of_asking']:.0f} s of asking", flush=True)
    print(markdown(results))


def markdown(results: dict) -> str:
    """Print teacher-forced and free-running figures, one row for each number of edits."""
    tables = []
    for way in ("teacher_forced", "free_running"):
        rows = {f"{row['edits']} edits": row[way] | row for row in results["rows"]}
        tables.append(table(way.replace("_", "-"), COLUMNS | {"crowded": "crowded"}, rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
