"""Write a benchmark of real pictures, in MMEdit's file format, out of a folder of pictures.

    npm pack emoji-datasource-{google,twitter,apple,facebook}@16.0.0
    python benchmarks/pictures.py FOLDER --unpack emoji-datasource-*.tgz
    apt-get download tuxpaint-stamps-default openclipart-png     then dpkg -x each to FOLDER
    rm -r FOLDER/usr/share/tuxpaint/stamps/symbols               no photographs, nor are cartoons:
    find FOLDER/usr/share/tuxpaint -name cartoon -prune -exec rm -r {} +
    python benchmarks/emoji.py FOLDER                            writes output/emoji
    python run.py --model output/smol-llava --data output/emoji
    python run.py --model output/smol-llava --data output/emoji/photos.eval.json --editor EDITOR

FOLDER is as `pictures.py` takes it; nothing of these packages ships. Things that are held out for
evaluation (another third where anything in FOLDER changes) are edited in eval.json, all others in
train.json. Edits say something else about a thing: its name, its kind or its color, counterfactual
or in words that no training has seen. The second picture of an edit is by another artist, where
there is one, else a view of the first. Half of the pictures that must stay as they are look most
alike to the edited one; none of them is edited. What UNSEEN_ARTIST has drawn is in no training.
photos.eval.json is a stream of photographs, whose second pictures are views.
"""

import argparse
import json
import random
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.pictures import Picture, read_folder
from data import ImageFile
from drawn import (
    COLORS,
    HELD_OUT,
    HELD_OUT_WORDS,
    MORE_QUESTIONS,
    OTHER_QUESTIONS,
    PHRASINGS,
    THING,
    open_target,
    text_questions,
)
from training_pictures import View, on_white

UNSEEN_ARTIST = "facebook"  # a part of the folder's path
PHOTOGRAPHS = ("photo", "tuxpaint")  # parts of the paths of folders of photographs
KINDS = {
    "Smileys & Emotion": "a face", "People & Body": "a person", "Animals & Nature": "nature",
    "Food & Drink": "food", "Travel & Places": "a place", "Activities": "an activity",
    "Objects": "an object",
}  # fmt: skip
# Ways to ask; the last HELD_OUT of each are in no training.
QUESTIONS = {
    "name": PHRASINGS[THING],
    "kind": (
        "What kind of thing is it?", "To which group does this thing belong?",
        "Is it a person, food, a place or what?", "What sort of thing is shown?",
        "Which category is this?", "What type of thing do you see?", "Name the kind of thing.",
        "Which kind of thing is this?", "What group of things is this from?",
        "In which category would you put it?", "Tell me the sort of thing.",
        "What class of thing is that?",
    ),
    "color": (
        "What color is it?", "Which color does it mostly have?", "What is its main color?",
        "In which color is it drawn?", "Tell me the color of it.", "Which color do you see most?",
        "What is the color of this thing?", "Name its color.", "What color is this thing?",
        "Which color has it?", "What color stands out here?", "Say which color it has.",
    ),
}  # fmt: skip
TEXT_QUESTIONS = [(asked, said) for _, asked, said in text_questions() if asked.endswith("?")]
OPEN_SHARE = 0.4  # of the edits, in words of no training; the others are true of another thing
EDITED_SHARE = 0.75  # of the things; the others are never edited
SECOND_SHARE = 0.5  # of these, of which another fact is edited too
TWINS_APART = 0.2  # pictures of 12 x 12 pixels that lie nearer show the same
LARGEST = 2**24  # pixels of a picture; openclipart has some that take a minute to open


@dataclass(frozen=True)
class Thing:
    """What one thing's pictures are, and what is true of it; None where nobody knows."""

    files: tuple[Path, ...]  # one of each artist
    name: str
    kind: str | None
    color: str | None  # if all artists agree

    def known(self) -> list[str]:
        """The families of questions whose answers are known."""
        return [family for family in QUESTIONS if getattr(self, family)]


def small(file: Path, side: int) -> np.ndarray | None:
    """Look at a picture with few pixels, (side, side, 3); None if it is too large or damaged."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            if image.width * image.height > LARGEST:
                return None
            seen = on_white(image).resize((side, side), Image.Resampling.BOX)
    except Exception:  # PIL's readers raise all kinds
        return None
    return np.asarray(seen, dtype=np.float32)


def main_color(file: Path) -> str | None:
    """Name the color that most of a picture has, paper left out; None where no color has half."""
    pixels = small(file, 24).reshape(-1, 3)
    pixels = pixels[(pixels < 235).any(1)]
    if len(pixels) < 60:
        return None
    names = np.array(list(COLORS))
    apart = np.linalg.norm(pixels[:, None] - np.array(list(COLORS.values())), axis=-1)
    (color, count), *_ = Counter(names[apart.argmin(1)]).most_common(1)
    return str(color) if count > len(pixels) / 2 else None


def has(file: Path, *parts: str) -> bool:
    """Tell whether a file lies in a folder whose name has one of these parts."""
    return any(part in str(file.parent).lower() for part in parts)


def read_things(folder: Path) -> tuple[list[Thing], list[Thing], list[Picture]]:
    """Give distinct things to train and to evaluate on, and all pictures of the former.

    Raises OSError, TypeError or ValueError that says what is wrong with the folder.
    """
    if has(folder.resolve() / "any", UNSEEN_ARTIST, *PHOTOGRAPHS):
        parts = ", ".join((UNSEEN_ARTIST, *PHOTOGRAPHS))
        raise ValueError(f"name {folder.resolve()} otherwise: {parts} tell its parts apart")
    training, evaluation = read_folder(folder)
    held_out = distinct(things_of(evaluation, training=False))
    return distinct(things_of(training, training=True), held_out), held_out, training


def things_of(pictures: list[Picture], training: bool) -> list[Thing]:
    """Gather pictures by what they show, in each folder the first; a photograph is its own thing.

    training: without the unseen artist, and without things whose names have held-out words.
    """
    by_thing: dict[tuple, dict[Path, Picture]] = {}
    unseen = set(HELD_OUT_WORDS) if training else set()
    for picture in pictures:
        path = picture.file.path
        if path.is_symlink() or (training and has(path, UNSEEN_ARTIST)):
            continue
        drawings = by_thing.setdefault((picture.thing, has(path, *PHOTOGRAPHS)), {})
        if path.parent not in drawings and small(path, 1) is not None:
            drawings[path.parent] = picture
    things = []
    for (name, photo), drawings in tqdm(sorted(by_thing.items()), desc="things"):
        words = name.replace("_", " ").replace("-", " ").split()
        if not drawings or not words or unseen.intersection(words):
            continue
        files = tuple(picture.file.path for picture in drawings.values())
        groups = [picture.group for picture in drawings.values() if picture.group]
        kind = "a photo" if photo else KINDS.get(groups[0] if groups else None)
        colors = {main_color(file) for file in files}
        color = colors.pop() if len(colors) == 1 else None
        things.append(Thing(files, " ".join(words), kind, color))
    return things


def looks_of(things: list[Thing]) -> np.ndarray:
    """The looks of the first picture of each thing, (n, 432), from 0 to 1."""
    return np.stack([small(thing.files[0], 12).reshape(-1) for thing in things]) / 255


def apart_from(looks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Squared distances between looks, (n, m)."""
    products = looks @ others.T
    return (looks**2).sum(1)[:, None] + (others**2).sum(1) - 2 * products


def distinct(things: list[Thing], others: list[Thing] = ()) -> list[Thing]:
    """Leave out things that look like an earlier one, or like one of the others."""
    if not things:
        return []
    looks, left = looks_of(things), []
    twins = apart_from(looks, looks) < TWINS_APART
    known = [False] * len(things)
    if others:
        known = (apart_from(looks, looks_of(others)) < TWINS_APART).any(1).tolist()
    for i in range(len(things)):
        if not known[i] and not twins[i, left].any():
            left.append(i)
    return [things[i] for i in left]


class Writer:
    """Makes records, and the folder of the pictures that they name."""

    def __init__(self, source: Path, folder: Path, seed: str):
        self.source, self.images, self.rng = source, folder / "images", random.Random(seed)

    def image(self, file: Path) -> str:
        """Copy a picture, once; give its name in the records."""
        name = file.relative_to(self.source)
        if not (self.images / name).exists():
            (self.images / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, self.images / name)
        return str(name)

    def view(self, file: Path) -> str:
        """Write another look at a picture."""
        name = Path("views") / f"{file.stem}-{self.rng.randrange(10**9)}.png"
        (self.images / name).parent.mkdir(parents=True, exist_ok=True)
        View(ImageFile(file), self.rng.randrange(2**31)).open().save(self.images / name)
        return str(name)

    def record(
        self, thing: Thing, family: str, free: list[str], left: Thing, wrong: list, held_out: bool
    ) -> dict[str, str]:
        """One edit of what is said of a thing.

        free: families that no edit of this thing changes; left: a thing that is not edited; wrong:
        answers that are true of other things.
        """
        rng = self.rng
        asked = {name: phrases[:-HELD_OUT] for name, phrases in QUESTIONS.items()}
        prompt, true = rng.choice(asked[family]), getattr(thing, family)
        again = QUESTIONS[family][-HELD_OUT:] if held_out else asked[family]
        target = rng.choice([answer for answer in wrong if answer != true])
        if rng.random() < OPEN_SHARE:
            target = open_target(rng, held_out)
        file, *others = rng.sample(thing.files, len(thing.files))
        own_artist = [other for other in left.files if other.parent == file.parent]
        asked_left = rng.choice(left.known())
        # Asked without a picture, and with the edited one: half of these are about the picture.
        loc, loc_answer = rng.choice(TEXT_QUESTIONS)
        if rng.random() < 0.5:
            loc, loc_answer = rng.choice(MORE_QUESTIONS if held_out else OTHER_QUESTIONS), "yes"
            if free and rng.random() < 0.5:
                other = rng.choice(free)
                loc, loc_answer = rng.choice(asked[other]), getattr(thing, other)
        return {
            "src": prompt,
            "pred": true,
            "alt": target,
            "rephrase": rng.choice([phrase for phrase in again if phrase != prompt]),
            "image": self.image(file),
            "image_rephrase": self.image(others[0]) if others else self.view(file),
            "loc": loc.rstrip("?."),
            "loc_ans": loc_answer,
            "m_loc": self.image(rng.choice(own_artist or left.files)),
            "m_loc_q": rng.choice(asked[asked_left]),
            "m_loc_a": getattr(left, asked_left),
        }

    def records(self, things: list[Thing], most: int, held_out: bool) -> list[dict[str, str]]:
        """Edit facts of EDITED_SHARE of the things; no locality query asks for an edited fact."""
        mixed = self.rng.sample(things, len(things))
        cut = round(EDITED_SHARE * len(mixed))
        edited, left = mixed[:cut], mixed[cut:]
        named = [thing for thing in things if thing.kind] or things  # others by their files' names
        answers = {"kind": list(KINDS.values()), "color": list(COLORS)}
        answers["name"] = sorted({thing.name for thing in named})
        if not edited or not left or len(answers["name"]) < 2:
            return []  # too few things
        facts, free = [], []
        for i, thing in enumerate(edited):
            families = self.rng.sample(thing.known(), len(thing.known()))
            changed = families[: 1 + (self.rng.random() < SECOND_SHARE)]
            facts += [(i, family) for family in changed]
            # What a thing is called tells its kind, so an edit of one may change both.
            told = {"name", "kind"} if {"name", "kind"}.intersection(changed) else set()
            free.append([family for family in families if family not in told.union(changed)])
        alike, records = look_alikes(edited, left), []
        self.rng.shuffle(facts)
        for i, family in tqdm(facts[:most], desc="records"):
            near = self.rng.choice(alike[i] if self.rng.random() < 0.5 else left)
            told = free[i], near, answers[family], held_out
            records.append(self.record(edited[i], family, *told))
        return records


def look_alikes(things: list[Thing], others: list[Thing]) -> list[list[Thing]]:
    """For each thing, three of the others whose pictures look most alike, lightness aside."""
    looks, others_looks = (looks_of(group) for group in (things, others))
    looks, others_looks = (x - x.mean(1, keepdims=True) for x in (looks, others_looks))
    nearest = apart_from(looks, others_looks).argsort(1)[:, :3]
    return [[others[i] for i in row] for row in nearest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="pictures: see the head of this file")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "emoji", help="folder")
    parser.add_argument("--edits", type=int, default=500, help="records of eval.json, at most")
    parser.add_argument("--photos", type=int, default=100, help="of photos.eval.json, at most")
    parser.add_argument("--train", type=int, default=6000, help="of train.json, at most")
    parser.add_argument("--seed", type=int, default=0, help="of all choices (default 0)")
    given = parser.parse_args()
    if given.out.exists():
        sys.exit(f"emoji.py: {given.out} exists; delete it or choose another --out")
    try:
        training, held_out, _ = read_things(given.folder)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"emoji.py: {error}")
    parts = {
        "train": training,
        "eval": [
            thing for thing in held_out if thing.kind and not has(thing.files[0], *PHOTOGRAPHS)
        ],
        "photos.eval": [thing for thing in held_out if has(thing.files[0], *PHOTOGRAPHS)],
    }
    for (name, things), most in zip(
        parts.items(), (given.train, given.edits, given.photos), strict=True
    ):
        writer = Writer(given.folder, given.out, f"{name} {given.seed}")
        records = writer.records(things, most, held_out=name != "train")
        if records:
            content = json.dumps(records, indent=1, ensure_ascii=False)
            (given.out / f"{name}.json").write_text(content, encoding="utf-8")
        print(f"{given.out / name}.json: {len(records)} records about {len(things)} things")


if __name__ == "__main__":
    main()
