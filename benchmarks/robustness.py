"""Ask edited facts with spoiled pictures, edit one picture three times, and in another order.

    python run.py                         first: the editor in output/
    python benchmarks/robustness.py --edits 250       two minutes on one thread
    python benchmarks/robustness.py --table FILE

The edits are made with the pictures as they are. Beside the edited answers, and those to another
question about the same picture, stands how often the unedited model answers as it does of the
picture as it is. Then three of the four questions about each picture are edited, in two orders; the
fourth must stay. Writes robustness.json.
"""

import io
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.common import open_results, options_of, percent, table, trained_editor
from data import Query, normalise
from drawn import FAMILIES, HELD_OUT, PHRASINGS, Drawing, drawn_stream, open_target, split_scenes
from liveedit import LiveEdit
from run import answer, load_model, question


def noise(image: Image.Image, deviation: float) -> Image.Image:
    """Add Gaussian noise to each number of each pixel (0 to 255)."""
    pixels = numpy.asarray(image, dtype=float)
    pixels = pixels + numpy.random.default_rng(0).normal(0, deviation, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def crop(image: Image.Image, share: float) -> Image.Image:
    """Keep the middle, and scale it to the size of the whole."""
    margin = [round(side * (1 - share) / 2) for side in image.size]
    box = (*margin, image.width - margin[0], image.height - margin[1])
    return image.crop(box).resize(image.size)


def turn(image: Image.Image, degrees: float) -> Image.Image:
    """Turn the picture; corners are filled with its first pixel's color."""
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=image.getpixel((0, 0)))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Compress the picture."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def blur(image: Image.Image, radius: float) -> Image.Image:
    """Blur the picture."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def scale(image: Image.Image, factor: float) -> Image.Image:
    """Give the picture another size."""
    return image.resize((round(image.width * factor), round(image.height * factor)))


SPOILED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": Image.Image.copy,
    "noise of deviation 10": partial(noise, deviation=10),
    "noise of deviation 30": partial(noise, deviation=30),
    "blur of radius 1": partial(blur, radius=1),
    "blur of radius 3": partial(blur, radius=3),
    "middle 90 %": partial(crop, share=0.9),
    "turned by 15 degrees": partial(turn, degrees=15),
    "turned by 90 degrees": partial(turn, degrees=90),
    "a quarter of the size": partial(scale, factor=0.25),
    "three times the size": partial(scale, factor=3),
    "JPEG of quality 20": partial(jpeg, quality=20),
}


SPOILED_COLUMNS = {
    "edited": "edited answer", "other": "other question as before",
    "edited_unedited": "unedited: edited question", "other_unedited": "unedited: other question",
}  # fmt: skip


@dataclass(frozen=True)
class Spoiled:
    """A drawing that is spoiled when it is opened."""

    drawing: Drawing
    how: str

    def open(self) -> Image.Image:
        """Draw the picture and spoil it."""
        return SPOILED[self.how](self.drawing.open())


def spoiled(query: Query, how: str) -> Query:
    """The same question about the spoiled picture."""
    return replace(query, image=Spoiled(query.image, how))


def share_same(one: list[str], other: list[str]) -> float:
    """Tell how many answers agree, in per cent."""
    return percent(normalise(a) == normalise(b) for a, b in zip(one, other, strict=True))


def said(editor: LiveEdit, queries: list[Query]) -> list[str]:
    """Answer freely."""
    return [one.generated for one in answer(editor, queries, 128)]


def three_of_each(pictures: int, seed: int) -> dict[str, list[Query]]:
    """Edit three of four facts of each picture; ask them, in other words and of another drawing.

    The fourth, untouched, asks the edited picture itself.
    """
    rng, asked = random.Random(f"three {seed}"), {}
    for scene in rng.sample(split_scenes()[1], pictures):
        drawings = [Drawing(scene, rng.randrange(2**31)) for _ in range(2)]
        families = rng.sample(FAMILIES, len(FAMILIES))
        for family in families[1:]:
            target, words = open_target(rng, held_out=True), PHRASINGS[family]
            edit = Query(drawings[0], rng.choice(words[:-HELD_OUT]), target, (scene, family))
            asked.setdefault("edited", []).append(edit)
            rephrased = replace(edit, prompt=rng.choice(words[-HELD_OUT:]))
            asked.setdefault("in other words", []).append(rephrased)
            asked.setdefault("another drawing", []).append(replace(edit, image=drawings[1]))
        fourth = rng.choice(PHRASINGS[families[0]])
        truth = Query(drawings[0], fourth, scene.answer(families[0]), (scene, families[0]))
        asked.setdefault("fourth question as before", []).append(truth)
    return asked


def one_picture_many_edits(editor: LiveEdit, pictures: int, seed: int) -> dict[str, dict]:
    """Give the shares of right answers when edits come in turn, and when they come in any order."""
    asked, rows = three_of_each(pictures, seed), {}
    untouched = asked.pop("fourth question as before")
    editor.reset()
    before = said(editor, untouched)
    edits = [question(query) for query in asked["edited"]]
    shuffled = random.Random(seed).sample(edits, len(edits))
    for order, ordered in (("in turn", edits), ("in any order", shuffled)):
        editor.reset()
        editor.edit_many(ordered, 128)
        row = {
            name: share_same(said(editor, queries), [query.target for query in queries])
            for name, queries in asked.items()
        }
        rows[order] = row | {
            "fourth question as before": share_same(said(editor, untouched), before)
        }
    return rows


def main() -> None:
    parser = options_of(__doc__, "robustness.json")
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.table:
        print(markdown(json.loads(given.table.read_text())))
        return
    editor = trained_editor(*load_model(given.model, "cpu", "auto"), given.editor)
    settings = {name: getattr(given, name) for name in ("model", "edits", "seed")}
    results = open_results(given.out, settings) | {"rows": {}}
    stream = drawn_stream(given.edits, given.seed)
    edits = [sample.edit for sample in stream]
    others = [sample.queries["same_image"] for sample in stream]
    targets = [edit.target for edit in edits]
    before, before_other = said(editor, edits), said(editor, others)
    editor.edit_many([question(edit) for edit in edits], 128)
    for how in SPOILED:
        asked, asked_other = ([spoiled(q, how) for q in group] for group in (edits, others))
        row = {"edited": share_same(said(editor, asked), targets)}
        row["other"] = share_same(said(editor, asked_other), before_other)
        with editor.disabled():
            row["edited_unedited"] = share_same(said(editor, asked), before)
            row["other_unedited"] = share_same(said(editor, asked_other), before_other)
        results["rows"][how] = row
        given.out.write_text(json.dumps(results, indent=1))
        print(how, row, flush=True)
    results["three_of_each"] = one_picture_many_edits(editor, given.edits // 5, given.seed)
    given.out.write_text(json.dumps(results, indent=1))
    print(markdown(results))


def markdown(results: dict) -> str:
    """Print free-running figures, one row for each way to spoil a picture."""
    three = results["three_of_each"]
    columns = {name: name for name in next(iter(three.values()))}
    tables = table("picture", SPOILED_COLUMNS, results["rows"])
    return tables + "\n\n" + table("three edits of each picture", columns, three)


if __name__ == "__main__":
    main()
