"""The figure of the main job: `python benchmarks/figure.py output` draws output/edits.png anew.

Reads what `python run.py` left in a folder; only runs on the drawn world can be drawn again.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import EditSample
from drawn import drawn_stream
from training_pictures import on_white

TITLES = {
    "reliability": "edit",
    "text_generality": "rephrased",
    "modal_generality": "another picture",
    "same_image": "same image",
    "similar_image": "similar image",
    "modal_locality": "other image",
}
CELL, ROW, SIDE = 290, 186, 96  # pixels: width of a column, height of a row, side of a picture


def draw_edits(stream: list[EditSample], predictions: list[dict], file: Path, shown: int = 6):
    """Draw some edits with the answers before and after, neighbors beside them; wrong is red.

    predictions: as the main job writes them, those after the whole stream last.
    """
    final = iter(predictions[-sum(len(sample.queries) for sample in stream) :])
    results = [{name: next(final) for name in sample.queries} for sample in stream]
    kinds = sorted({sample.kind for sample in stream})
    chosen = []
    for kind in kinds:
        of_kind = [i for i, sample in enumerate(stream) if sample.kind == kind]
        chosen += of_kind[: max(1, shown // len(kinds))]
    font = ImageFont.load_default(12)
    size = (CELL * len(TITLES) + 10, 24 + ROW * len(chosen))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, title) in enumerate(TITLES.items()):
        x = 10 + column * CELL
        pen.text((x, 5), title, fill="black", font=font)
        for row, i in enumerate(chosen):
            if name in stream[i].queries:
                picture = on_white(stream[i].queries[name].image.open()).resize((SIDE, SIDE))
                sheet.paste(picture, (x, 24 + row * ROW))
                _write(pen, font, (x, 24 + row * ROW + SIDE + 4), results[i][name])
    sheet.save(file)


def _write(pen: ImageDraw.ImageDraw, font, at: tuple[int, int], result: dict) -> None:
    """Write a question and its answers below one another."""
    color = "darkgreen" if result["free_running"] else "firebrick"
    lines = [(result["prompt"], "black"), (f"before: {result['before']}", "black")]
    lines.append((f"after: {result['after']}", color))
    if not result["free_running"]:
        lines.append((f"expected: {result['expected']}", color))
    for k, (line, fill) in enumerate(lines):
        line = " ".join(line.split())
        while pen.textlength(line, font=font) > CELL - 14:
            line = line[:-2].rstrip("….") + "…"
        pen.text((at[0], at[1] + 16 * k), line, fill=fill, font=font)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    options = json.loads((folder / "metrics.json").read_text())["options"]
    if options["data"] is not None:
        sys.exit(f"{folder} is no run on the drawn world")
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    stream = drawn_stream(options["edits"], options["seed"])
    draw_edits(stream, [json.loads(line) for line in lines], folder / "edits.png")


if __name__ == "__main__":
    main()
