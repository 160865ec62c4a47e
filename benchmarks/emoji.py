"""Write a benchmark of real pictures, in MMEdit's file format, out of a folder of pictures.

    npm pack emoji-datasource-{google,twitter,apple,facebook}@16.0.0
    python benchmarks/pictures.py FOLDER --unpack emoji-datasource-*.tgz
    apt-get download tuxpaint-stamps-default openclipart-png     then dpkg -x each to FOLDER
    python benchmarks/emoji.py FOLDER                        writes output/emoji
    python run.py --model output/smol-llava --data output/emoji
    python run.py --model output/smol-llava --data output/emoji/photos.eval.json --editor ...

FOLDER is as `pictures.py` takes it; nothing of these packages ships. Things that are held out for
evaluation are edited in eval.json, all others in train.json. Edits say something else about a
thing: its name, its kind or its color, counterfactual or in words that no training has seen. The
second picture of an edit is by another artist, where there is one, else a view of the first. Half
of the pictures that must stay as they are look most alike to the edited one; none of them is
edited. What UNSEEN_ARTIST has drawn is in no training. photos.eval.json is a stream of photographs,
whose second pictures are views.
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
from drawn import COLORS, HELD_OUT, PHRASINGS, THING, open_target, text_questions
from training_pictures import View, on_white

UNSEEN_ARTIST = "facebook"  # a part of the folder's name
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
FIRST_FAMILIES = ("name", "name", "kind")
OPEN_SHARE = 0.4  # of the edits, in words of no training; the others are true of another thing
EDITED_SHARE = 0.86  # of the things; the others are never edited


@dataclass(frozen=True)
class Thing:
    """What one thing's pictures are, and what is true of it; None where nobody knows."""

    files: tuple[Path, ...]  # one of each artist
    name: str
    kind: str | None
    color: str | None

    def known(self) -> list[str]:
        """The families of questions whose answers are known."""
        return [family for family in QUESTIONS if getattr(self, family)]


def main_color(file: Path) -> str | None:
    """Name the color that most of a picture has, paper left out; None where no color has half."""
    small = on_white(ImageFile(file).open()).resize((24, 24), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=float).reshape(-1, 3)
    pixels = pixels[(pixels < 235).any(1)]
    if len(pixels) < 60:
        return None
    names = np.array(list(COLORS))
    apart = np.linalg.norm(pixels[:, None] - np.array(list(COLORS.values())), axis=-1)
    (color, count), *_ = Counter(names[apart.argmin(1)]).most_common(1)
    return str(color) if count > len(pixels) / 2 else None


def is_small(file: Path) -> bool:
    """Tell whether a picture can be opened in no time."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            return image.width * image.height < 2**20
    except Exception:  # PIL's readers raise all kinds
        return False


def things_of(pictures: list[Picture], unseen_artist: bool) -> list[Thing]:
    """Gather pictures by what they show. Of two drawings by one artist the first is taken."""
    by_thing: dict[str, dict[Path, Picture]] = {}
    for picture in pictures:
        path, artist = picture.file.path, picture.file.path.parent
        if path.is_symlink() or not is_small(path):  # openclipart's are of any size
            continue
        if unseen_artist or UNSEEN_ARTIST not in artist.name:
            by_thing.setdefault(picture.thing, {}).setdefault(artist, picture)
    things = []
    for name, drawings in tqdm(sorted(by_thing.items()), desc="things"):
        files = tuple(picture.file.path for picture in drawings.values())
        group = next(iter(drawings.values())).group
        words = " ".join(name.replace("_", " ").replace("-", " ").split()) or files[0].stem
        kind = "a photo" if files[0].suffix == ".jpg" else KINDS.get(group)
        things.append(Thing(files, words, kind, main_color(files[0])))
    return things


class Writer:
    """Makes records, and the folder of the pictures that they name."""

    def __init__(self, folder: Path, seed: str):
        self.images, self.rng = folder / "images", random.Random(seed)

    def image(self, file: Path) -> str:
        """Copy a picture, once; give its name in the records."""
        name = Path(file.parent.name) / file.name
        if not (self.images / name).exists():
            (self.images / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, self.images / name)
        return str(name)

    def view(self, file: Path) -> str:
        """Write another look at a picture."""
        name = Path("views") / f"{file.parent.name}-{file.stem}-{self.rng.randrange(10**9)}.png"
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
        asked_left = rng.choice(left.known())
        # Asked without a picture, and with the edited one: half of these are about the picture.
        loc, loc_answer = rng.choice(TEXT_QUESTIONS)
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
            "loc": loc.rstrip("?"),
            "loc_ans": loc_answer,
            "m_loc": self.image(rng.choice(left.files)),
            "m_loc_q": rng.choice(asked[asked_left]),
            "m_loc_a": getattr(left, asked_left),
        }

    def records(self, things: list[Thing], most: int, held_out: bool) -> list[dict[str, str]]:
        """Edit facts of EDITED_SHARE of the things; no locality query asks for an edited fact."""
        mixed = self.rng.sample(things, len(things))
        cut = round(EDITED_SHARE * len(mixed))
        edited, left = mixed[:cut], mixed[cut:]
        # What a thing is called, or its kind, which follows from the name; then colors of some.
        facts = [(i, self.rng.choice(FIRST_FAMILIES)) for i in range(cut)]
        facts = [(i, family if getattr(edited[i], family) else "name") for i, family in facts]
        facts += [(i, "color") for i, thing in enumerate(edited) if thing.color]
        facts = facts[:most]
        named = [thing for thing in things if thing.kind] or things  # others by their files' names
        answers = {name: sorted({getattr(t, name) for t in named} - {None}) for name in QUESTIONS}
        answers["kind"] = list(KINDS.values())
        colored, records = {i for i, family in facts if family == "color"}, []
        alike = look_alikes(edited, left)
        for i, family in tqdm(facts, desc="records"):
            free = ["color"] if edited[i].color and i not in colored else []
            near = alike[i] if self.rng.random() < 0.5 else left
            told = self.rng.choice(near), answers[family], held_out
            records.append(self.record(edited[i], family, free, *told))
        return records


def look_alikes(things: list[Thing], others: list[Thing]) -> list[list[Thing]]:
    """For each thing, three of the others whose pictures look most alike, by few pixels."""
    looks = [
        np.stack([small(thing.files[0]).reshape(-1) for thing in group])
        for group in (things, others)
    ]
    apart = (looks[1] ** 2).sum(1) - 2 * looks[0] @ looks[1].T  # squared, but for what all share
    return [[others[i] for i in nearest] for nearest in apart.argsort(1)[:, :3]]


def small(file: Path) -> np.ndarray:
    """Look at a picture with 12 x 12 pixels."""
    image = on_white(ImageFile(file).open())
    return np.asarray(image.resize((12, 12), Image.Resampling.BOX), dtype=float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "emoji")
    parser.add_argument("--edits", type=int, default=500, help="records of eval.json")
    parser.add_argument("--photos", type=int, default=100, help="records of photos.eval.json")
    parser.add_argument("--train", type=int, default=6000, help="records of train.json, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.out.exists():
        sys.exit(f"emoji.py: {given.out} exists; delete it or choose another --out")
    try:
        training, evaluation = read_folder(given.folder)
    except (OSError, ValueError) as error:
        sys.exit(f"emoji.py: {error}")
    photos = [picture for picture in evaluation if picture.file.path.suffix == ".jpg"]
    drawn = [picture for picture in evaluation if picture.name]
    for name, pictures, most in (
        ("train", training, given.train),
        ("eval", drawn, given.edits),
        ("photos.eval", photos, given.photos),
    ):
        held_out = name != "train"
        writer = Writer(given.out, f"{name} {given.seed}")
        records = writer.records(things_of(pictures, held_out), most, held_out)
        content = json.dumps(records, indent=1, ensure_ascii=False)
        (given.out / f"{name}.json").write_text(content, encoding="utf-8")
        print(f"{given.out / name}.json: {len(records)} records")


if __name__ == "__main__":
    main()
