"""Draw the figure of a main job anew: some of its edits, with the answers before and after.

    python benchmarks/figure.py output                 draws output/edits.png
    python benchmarks/figure.py output/smol --shown 20 --of google twitter --out emoji.png

Reads what `python run.py` left in a folder, and the benchmark where it was one. With --of, edits
alone all of whose pictures lie in folders with such a part in their name.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import EditSample
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
    sheet.quantize().save(file, optimize=True)  # 256 colors: a third of the bytes


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
    # Here, as `run.py` draws with this file and must not be loaded by it once more.
    from benchmarks.common import read_stream
    from benchmarks.emoji import has
    from run import positive

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="--out of the main job")
    parser.add_argument("--shown", type=positive, default=6, help="edits (default 6)")
    parser.add_argument("--of", nargs="+", help="parts of the names of the pictures' folders")
    parser.add_argument("--out", type=Path, help="file (default edits.png in the folder)")
    given = parser.parse_args()
    try:
        options = json.loads((given.folder / "metrics.json").read_text())["options"]
        lines = (given.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        predictions = [json.loads(line) for line in lines]
        stream = read_stream(options["data"], options["edits"], options["seed"])
    except (OSError, ValueError) as error:
        sys.exit(f"figure.py: {error}")
    if given.of and options["data"] is None:
        sys.exit(f"figure.py: --of is for pictures in files; {given.folder} has drawn ones")
    asked = sum(len(sample.queries) for sample in stream)
    if len(predictions) < asked:
        sys.exit(
            f"figure.py: {given.folder} has {len(predictions)} predictions, {asked} are needed"
        )
    final, chosen, results = iter(predictions[-asked:]), [], []
    for sample in stream:
        own = [next(final) for _ in sample.queries]
        pictures = [query.image for query in sample.queries.values() if query.image]
        if not given.of or all(has(picture.path, *given.of) for picture in pictures):
            chosen.append(sample)
            results += own
    if not chosen:
        sys.exit(f"figure.py: no edit has all its pictures in folders of {' or '.join(given.of)}")
    file = given.out or given.folder / "edits.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    draw_edits(chosen, results, file, given.shown)


if __name__ == "__main__":
    main()
