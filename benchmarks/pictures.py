"""Edit any pictures: emoji, photographs, whatever lies in a folder; nothing of it in the training.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python benchmarks/pictures.py FOLDER --unpack emoji-datasource-*.tgz
    python benchmarks/pictures.py FOLDER --editor tiny-llava/editor

FOLDER has sub-folders of pictures; files of one name in several of them show one thing, drawn by
several artists. Its `names.json` says what things are called, `{"things": [{"file", "name"}]}`, and
of which "group" they are. A third of the things is for evaluation alone: `tiny-llava/train.py`
learned to see on the others.
Edits say that a picture shows something else ("What is this?"), with words that no training has
seen; beside them stand edits of questions that no training has asked. Writes pictures.json.
"""

import json
import random
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.common import (
    ask_before,
    edit_and_judge,
    open_results,
    options_of,
    percent,
    table,
    trained_editor,
)
from data import EditSample, ImageFile, Query
from drawn import HELD_OUT, OTHER_QUESTIONS, PHRASINGS, THING, open_target
from run import load_model
from training_pictures import View, on_white

COLUMNS = {
    "reliability": "edit", "text_generality": "rephrased", "modal_generality": "view",
    "artist": "other artist", "same_image": "other question", "modal_locality": "other picture",
}  # fmt: skip


# Asked in no training; what else a visitor may come up with.
VISITORS_QUESTIONS = (
    "Who is on it?", "Which city is this?", "What should I cook with it?", "When was it taken?",
    "Whose is that?", "What is its purpose?", "Tell me its brand.", "How many legs does it have?",
    "Which language is that from?", "Why is it funny?",
)  # fmt: skip
NO_THINGS = ("Symbols", "Flags", "Component")  # categories of emoji


@dataclass(frozen=True)
class Picture:
    """A file of a folder of pictures, and what it shows; name and group if somebody said them."""

    file: ImageFile
    thing: str
    name: str | None
    group: str | None = None


def read_folder(folder: Path) -> tuple[list[Picture], list[Picture]]:
    """Give (training, evaluation) pictures, split by thing: no thing is in both.

    Things of one name, and numbered pictures (fireworks, fireworks2), are one.
    """
    known, pictures = {}, []
    if (folder / "names.json").is_file():
        things = json.loads((folder / "names.json").read_text(encoding="utf-8"))["things"]
        known = {thing["file"]: thing for thing in things}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif"):
            told = known.get(path.name, {})
            thing = told.get("name") or path.stem.lower().rstrip("0123456789_- ")
            pictures.append(Picture(ImageFile(path), thing, told.get("name"), told.get("group")))
    if not pictures:
        raise FileNotFoundError(f"{folder} has no pictures in it")
    things = sorted({picture.thing for picture in pictures})
    held_out = set(random.Random("pictures").sample(things, len(things) // 3))
    trained = [picture for picture in pictures if picture.thing not in held_out]
    return trained, [picture for picture in pictures if picture.thing in held_out]


def unpack(packages: list[Path], folder: Path) -> None:
    """Fill a folder of pictures from packages of emoji, one sub-folder for each, with names."""
    things = {}
    for package in packages:
        target = folder / package.name.removesuffix(".tgz")
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(package) as archive:
            for emoji in json.load(archive.extractfile("package/emoji.json")):
                if emoji["category"] not in NO_THINGS:
                    name = emoji["short_name"].replace("_", " ").replace("-", " ")
                    told = {"file": emoji["image"], "name": name, "group": emoji["category"]}
                    things[emoji["image"]] = told
            for member in archive:
                file = Path(member.name)
                if file.parent.name == "64" and file.name in things:
                    (target / file.name).write_bytes(archive.extractfile(member).read())
    names = json.dumps({"things": list(things.values())}, indent=0)
    (folder / "names.json").write_text(names, encoding="utf-8")


def stream_of(
    pictures: list[Picture], edits: int, seed: int, visitors: bool = False
) -> list[EditSample]:
    """Edit so many pictures, of different things; all others stay as they are.

    visitors: edit VISITORS_QUESTIONS about them, and leave alone what the picture shows.
    """
    rng, by_thing = random.Random(seed), {}
    for picture in pictures:
        by_thing.setdefault(picture.thing, []).append(picture)
    things = sorted(by_thing)
    if len(things) <= edits:
        raise ValueError(f"{edits} edits need more things held out than {len(things)}")
    chosen, samples = rng.sample(things, edits), []
    rest = sorted(set(things) - set(chosen))
    for edited in chosen:
        left = rng.choice(rest)
        own = rng.sample(by_thing[edited], len(by_thing[edited]))
        picture, target = own[0].file, open_target(rng, held_out=True)
        prompt, fact = rng.choice(PHRASINGS[THING][:-HELD_OUT]), (edited, THING)
        rephrased = rng.choice(PHRASINGS[THING][-HELD_OUT:])
        asked = rng.choice((PHRASINGS["color"], PHRASINGS["background"], OTHER_QUESTIONS))
        view, other = View(picture, rng.randrange(2**31)), rng.choice(by_thing[left]).file
        queries = {
            "reliability": Query(picture, prompt, target, fact),
            "text_generality": Query(picture, rephrased, target, fact),
            "modal_generality": Query(view, prompt, target, fact),
            "same_image": Query(picture, rng.choice(asked), "yes", (edited, "other")),
            "modal_locality": Query(other, prompt, "yes", (left, THING)),
        }
        if visitors:
            prompt = rng.choice(VISITORS_QUESTIONS)
            for name in ("reliability", "modal_generality", "modal_locality"):
                queries[name] = replace(queries[name], prompt=prompt)
            shown = replace(queries.pop("text_generality"), target="yes", fact=(edited, "other"))
            queries["same_image"] = shown
        by_others = [p for p in own[1:] if p.file.path.name == picture.path.name]
        if by_others:
            queries["artist"] = replace(queries["reliability"], image=by_others[0].file)
        samples.append(EditSample("picture", queries))
    return samples


@torch.no_grad()
def lookup(model, processor, samples: list[EditSample], query: str) -> float | None:
    """Tell how often the picture of a query is nearest to its own edit's, in per cent.

    By the mean of what the model's eyes see of it: what can be found without any editor.
    """

    def looks(pictures: list) -> torch.Tensor:
        images = [on_white(picture.open()) for picture in pictures]
        pixels = processor.image_processor(images=images, return_tensors="pt").pixel_values
        return model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:].mean(1)

    asked = [i for i, sample in enumerate(samples) if query in sample.queries]
    if not asked:
        return None
    edited = looks([sample.edit.image for sample in samples])
    seen = looks([samples[i].queries[query].image for i in asked])
    edited, seen = (F.normalize((x - edited.mean(0)) / edited.std(0)) for x in (edited, seen))
    return percent(((seen @ edited.T).argmax(1) == torch.tensor(asked)).tolist())


def main() -> None:
    parser = options_of(__doc__, "pictures.json")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--unpack", type=Path, nargs="+", help="packages to fill the folder from")
    parser.add_argument("--edits", type=int, nargs="+", default=[50, 300])
    parser.add_argument("--asked", type=int, default=300, help="edits in all, in several streams")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.table:
        print(markdown(json.loads(given.table.read_text())))
        return
    if given.folder is None:
        parser.error("name a folder of pictures")
    try:
        if given.unpack:
            unpack(given.unpack, given.folder)
            return
        _, pictures = read_folder(given.folder)
        streams = {}
        for count in given.edits:
            seeds = range(max(1, given.asked // count))
            for visitors in (False, True):
                title = f"{count} edits" + ", visitors' questions" * visitors
                streams[title] = [
                    stream_of(pictures, count, 1000 * given.seed + s, visitors) for s in seeds
                ]
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"pictures.py: {error}")
    editor = trained_editor(*load_model(given.model, "cpu", "auto"), given.editor)
    settings = {name: getattr(given, name) for name in ("model", "seed", "asked")}
    results = open_results(given.out, settings) | {"rows": {}}
    for title, parts in streams.items():
        judged, batch_size = [], 64
        for part in parts:
            editor.reset()
            before = ask_before(editor, part, batch_size)
            for sample_results in edit_and_judge(editor, part, before, batch_size):
                judged += sample_results
        row = {"n": sum(map(len, parts))}
        for query in ("modal_generality", "artist"):
            found = [lookup(editor.model, editor.processor, part, query) for part in parts]
            row[f"{query}, lookup"] = None if None in found else sum(found) / len(found)
        for query in COLUMNS:
            asked = [result for result in judged if result["query"] == query]
            row[query] = percent(result["free_running"] for result in asked)
            row[f"{query} finds its edit"] = percent(result["own_edit"] for result in asked)
            row[f"{query} uses others"] = percent(result["other_edits"] > 0 for result in asked)
        results["rows"][title] = row
        given.out.write_text(json.dumps(results, indent=1))
    print(markdown(results))


def markdown(results: dict) -> str:
    """Print free-running figures, and how often a question found the edit that is meant."""
    nearest = {"modal_generality, lookup": "view", "artist, lookup": "other artist"}
    found = {f"{query} finds its edit": title for query, title in COLUMNS.items()}
    others = {f"{query} uses others": title for query, title in COLUMNS.items()}
    titles = ("free-running", "nearest by the eyes", "uses its edit", "uses another edit")
    rows, tables = results["rows"], []
    for title, columns in zip(titles, (COLUMNS, nearest, found, others), strict=True):
        # A folder may have one picture only of each thing.
        known = [key for key in columns if any(row[key] is not None for row in rows.values())]
        shown = {
            name: {key: "-" if row[key] is None else row[key] for key in known}
            for name, row in rows.items()
        }
        tables.append(table(title, {key: columns[key] for key in known}, shown))
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
