"""The world of drawn pictures that the tiny LLaVA learned: edit samples without a download.

What an editor is trained on, of this world and of other pictures: `training_pictures.py`.
"""

import math
import random
import string
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from data import EditSample, Query

COLORS = {
    "red": (220, 30, 35), "orange": (250, 140, 20), "yellow": (245, 225, 50),
    "green": (30, 150, 60), "blue": (35, 70, 210), "purple": (125, 40, 150),
    "pink": (250, 165, 195), "brown": (115, 70, 35), "black": (15, 15, 15),
    "white": (245, 245, 245), "gray": (135, 135, 135), "cyan": (60, 205, 225),
}  # fmt: skip
FOLDER = Path(__file__).resolve().parent / "tiny-llava"
CANVAS = 96  # pixels; pictures are drawn at twice this size and averaged, for smooth edges


def regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """A regular polygon, or a star where every second corner lies at radius `inner`."""
    count = corners if inner == 1.0 else 2 * corners
    points = []
    for i in range(count):
        radius, angle = (1.0, inner)[i % 2], 2 * math.pi * i / count
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return points


def _arc(radius: float, start: float, end: float, x: float = 0.0) -> list[tuple[float, float]]:
    """Points on a circle around (x, 0), from angle `start` to `end` in degrees."""
    steps = [math.radians(start + (end - start) * i / 40) for i in range(41)]
    return [(x + radius * math.cos(a), radius * math.sin(a)) for a in steps]


def _heart() -> list[tuple[float, float]]:
    points = []
    for t in (2 * math.pi * i / 60 for i in range(60)):
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -y / 16))
    return points


def _fit(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Scale an outline into the unit circle: then no turn can move it out of the canvas."""
    reach = max(math.hypot(x, y) for x, y in points)
    return [(x / reach, y / reach) for x, y in points]


# Outlines before turning and scaling.
SHAPES = {
    "circle": _fit(_arc(0.9, 0, 360)),
    "square": _fit([(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]),
    "triangle": _fit(regular(3)),
    "star": _fit(regular(5, 0.42)),
    "heart": _fit(_heart()),
    "cross": _fit([(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
                   (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)]),
    "crescent": _fit(_arc(1.0, 50, 310) + _arc(0.78, 282, 78, 0.45)),
    "ring": _fit(_arc(0.95, 0, 360) + _arc(0.5, 360, 0)),
    "arrow": _fit([(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1),
                   (-0.8, -0.1)]),
    "hourglass": _fit([(-0.8, -1), (0.8, -1), (0.12, 0), (0.8, 1), (-0.8, 1), (-0.12, 0)]),
    "bar": _fit([(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)]),
    "stairs": _fit([(-0.9, -0.9), (-0.3, -0.9), (-0.3, -0.3), (0.3, -0.3), (0.3, 0.3),
                    (0.9, 0.3), (0.9, 0.9), (-0.9, 0.9)]),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What a picture shows; size, place and angle are no part of it."""

    shape: str
    color: str
    background: str

    def answer(self, family: str) -> str:
        """The true answer to a question of one family."""
        if family == "caption":
            return f"a {self.color} {self.shape} on a {self.background} background"
        return getattr(self, family)

    def differences(self, other: "Scene") -> int:
        """Count the attributes in which two scenes differ."""
        attributes = ("shape", "color", "background")
        return sum(getattr(self, name) != getattr(other, name) for name in attributes)


@dataclass(frozen=True)
class Drawing:
    """One picture of a scene: `seed` decides size, place, angle and shade.

    palette: 0 draws in the colors that the scene names; any other number in others, chosen by it.
    """

    scene: Scene
    seed: int
    palette: int = 0

    def open(self) -> Image.Image:
        """Draw the picture."""
        scene, side, colors = self.scene, 2 * CANVAS, other_colors(self.palette)
        rng = random.Random(f"{scene.shape} {scene.color} {scene.background} {self.seed}")
        image = Image.new("RGB", (side, side), _shade(colors[scene.background], rng))
        radius = side * rng.uniform(0.28, 0.45)
        place = [rng.uniform(radius, side - radius) for _ in range(2)]
        points = placed(SHAPES[scene.shape], place, radius, rng.uniform(0, 2 * math.pi))
        ImageDraw.Draw(image).polygon(points, fill=_shade(colors[scene.color], rng))
        return image.reduce(2)


def other_colors(palette: int) -> dict[str, tuple[int, int, int]]:
    """The colors of a palette under the names of COLORS, which are true of palette 0 only.

    Those of a negative one are alike.
    """
    if not palette:
        return COLORS
    rng, colors = random.Random(f"palette {palette}"), []
    lowest, width, least = (0, 0, 0), 256, 60  # people can tell them apart
    if palette < 0:
        lowest, width, least = [rng.randrange(136) for _ in range(3)], 120, 40
    while len(colors) < len(COLORS):
        color = tuple(low + rng.randrange(width) for low in lowest)
        if all(math.dist(color, other) > least for other in colors):
            colors.append(color)
    return dict(zip(COLORS, colors, strict=True))


def placed(outline, place, radius: float, turn: float, squeeze: float = 1.0) -> list[tuple]:
    """Turn and scale an outline, narrowed by `squeeze` first, and move it to its place."""
    cos, sin, (x, y) = radius * math.cos(turn), radius * math.sin(turn), place
    narrow = [(a * squeeze, b) for a, b in outline]
    return [(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in narrow]


def _shade(color: tuple, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, part + rng.randint(-10, 10))) for part in color)


SCENES = [Scene(s, c, b) for s in SHAPES for c in COLORS for b in COLORS if c != b]
FAMILIES = ("shape", "color", "background", "caption")
# The last HELD_OUT phrasings of each family never occur in the editor's training: text generality
# is measured on them.
HELD_OUT = 4


def read_lines(name: str) -> list[str]:
    """The lines of a text file beside the tiny LLaVA, without comments."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def read_phrasings(name: str) -> dict[str, tuple[str, ...]]:
    """The ways to ask a question of each family, from a text file beside the tiny LLaVA."""
    phrasings: dict[str, tuple[str, ...]] = {}
    for line in read_lines(name):
        if line.startswith("["):
            family = line.strip("[]")
            phrasings[family] = ()
        else:
            phrasings[family] += (line,)
    return phrasings


PHRASINGS = read_phrasings("phrasings.txt")
THING = "thing"  # the family of questions that any picture can be asked
OTHER_QUESTIONS = read_lines("other_questions.txt")  # of no family
MORE_NAMINGS, MORE_QUESTIONS = read_phrasings("more_phrasings.txt").values()
OPPOSITES = """hot cold, big small, old young, fast slow, up down, left right, open closed,
    day night, happy sad, light dark, early late, full empty"""
OPPOSITES = tuple(tuple(pair.split()) for pair in OPPOSITES.split(","))


def text_questions() -> list[tuple[str, str, str]]:
    """All text-only questions of the world as (family, question, answer)."""
    plus = ("What is {} plus {}?", "How much is {} plus {}?", "Add {} and {}.")
    minus = ("What is {} minus {}?", "How much is {} minus {}?", "Take {1} from {0}.")
    questions = []
    for a in range(13):
        for b in range(13):
            questions += [("arithmetic", form.format(a, b), str(a + b)) for form in plus]
            if a >= b:
                questions += [("arithmetic", form.format(a, b), str(a - b)) for form in minus]
    for one, other in OPPOSITES:
        for word, answer in ((one, other), (other, one)):
            for form in ("What is the opposite of {}?", "Name the opposite of {}."):
                questions.append(("opposites", form.format(word), answer))
    return questions


ONSETS = "b bl d dr f fl g gr j k kl l m n p pr r s sk t tr v w z".split()
ENDINGS = ("", "b", "k", "l", "m", "n", "p", "r", "s", "t", "x")


def novel_word(rng: random.Random) -> str:
    """A made-up word of two or three syllables: several tokens for any tokenizer."""
    syllables = [rng.choice(ONSETS) + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3)))]
    return "".join(syllables) + rng.choice(ENDINGS)


# ------------------------------------------------------------------------------ words from outside


_NO_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))


def read_words() -> tuple[list[str], list[str]]:
    """English words and names, most frequent first: (for training, held out).

    One in ten is kept from every training of a tokenizer, model or editor. Of these, words of the
    drawn world's questions and answers, and words so short that a random string may be one, are in
    neither list.
    """
    words = read_lines("words.txt")
    held_out = words[9::10]
    del words[9::10]
    texts = [text for question in text_questions() for text in question]
    for phrases in (*PHRASINGS.values(), OTHER_QUESTIONS, MORE_NAMINGS, MORE_QUESTIONS):
        texts += phrases
    known = set(" ".join(texts).lower().translate(_NO_PUNCTUATION).split())
    return words, [word for word in held_out if len(word) > 3 and word.lower() not in known]


TRAINING_WORDS, HELD_OUT_WORDS = read_words()
OPEN_LENGTH = 24  # characters of a held-out open target at most
TRAINED_LENGTH = 32  # of others: words that training has seen have fewer tokens, so longer phrases
DOUBLED_LENGTH = 40  # of two in one
PHRASES = (
    "{} {}", "{} {}", "{} {} {}", "{} {} {}", "{} {} {} {}", "the {}", "a {}", "the {} of {}",
    "a {} {}", "{} and {}", "{} of the {}", "{} in a {}", "{} with the {} {}", "my {} {}",
)  # fmt: skip
NUMBERS = ("{n}", "{year}", "{year}", "{small}", "{small} {word}", "{small}.{small}", "{small}%")
ACCENTS = str.maketrans("aeioucn", "áéíöüçñ")


def open_target(rng: random.Random, held_out: bool) -> str:
    """A word, name, number or phrase, as people type them.

    held_out: its words are held out, and its numbers have three digits or more whose sum ends in
    7; those for training never have such a sum.
    """
    kind = rng.choices(("word", "name", "number", "phrase"), (40, 10, 15, 35))[0]
    while True:
        if kind == "word":
            text = _word(rng, held_out)
        elif kind == "name":
            text = " ".join(_word(rng, held_out).capitalize() for _ in range(rng.choice((2, 2, 3))))
        elif kind == "number":
            text = rng.choice(NUMBERS).format(
                n=rng.randrange(10 ** rng.randint(2, 5)),
                year=rng.randint(1000, 2100),
                small=rng.randrange(100),
                word=_word(rng, held_out),
            )
        else:
            text = rng.choice(PHRASES)
            while "{}" in text:
                text = text.replace("{}", _word(rng, held_out), 1)
            text = rng.choice((text, text, text, text[0].upper() + text[1:], text.title()))
        digits = [int(c) for c in text if c.isdigit()]
        ends_in_7 = sum(digits) % 10 == 7
        if held_out:
            fits = len(text) <= OPEN_LENGTH and (not digits or len(digits) > 2 and ends_in_7)
        else:
            fits = len(text) <= TRAINED_LENGTH and not ends_in_7
        if fits:
            return text


def _word(rng: random.Random, held_out: bool) -> str:
    """One word, the frequent more often; some with a capital, in capitals or with an accent."""
    words = HELD_OUT_WORDS if held_out else TRAINING_WORDS
    word = words[int(len(words) * rng.random() ** 1.5)]
    style = rng.random()
    if style < 0.1:
        return word.capitalize()
    if style < 0.13:
        return word.upper()
    if style < 0.16:
        letter = rng.choice(word)
        return word.replace(letter, letter.translate(ACCENTS), 1)
    return word


# --------------------------------------------------------------------------- the drawn benchmark

EVAL_SCENES = 0.4  # share of the scenes; the rest is for the editor's training


def _neighbors(scene: Scene) -> list[Scene]:
    """All scenes that differ in one attribute."""
    colors = [c for c in COLORS if c not in (scene.color, scene.background)]
    shapes = [replace(scene, shape=s) for s in SHAPES if s != scene.shape]
    backgrounds = [replace(scene, background=c) for c in colors]
    return shapes + [replace(scene, color=c) for c in colors] + backgrounds


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """(training scenes, evaluation scenes), disjoint, the same for every seed."""
    scenes = random.Random("split").sample(SCENES, len(SCENES))
    cut = round(EVAL_SCENES * len(scenes))
    return scenes[cut:], scenes[:cut]


def _pick(scenes: list[Scene], rng: random.Random, origin: Scene, least: int) -> Scene:
    """A random scene that differs from another in `least` attributes or more; most do."""
    while True:
        scene = rng.choice(scenes)
        if scene.differences(origin) >= least:
            return scene


class Shares(NamedTuple):
    """Shares of the kinds of targets; what is neither open nor made up is of the drawn world."""

    open: float  # of all edits
    novel_names: float  # of those that are neither open nor about captions
    doubled: float = 0.0  # of the open ones, two in one: long answers
    repeated: float = 0.0  # of the open ones, those that say a word twice: the hardest


EVAL_SHARES = Shares(open=0.4, novel_names=0.5)
TRAINING_SHARES = Shares(open=0.6, novel_names=0.65, doubled=0.3, repeated=0.3)


def edit_target(
    scene: Scene, family: str, scenes: list[Scene], rng, shares: Shares, held_out: bool
) -> tuple[str, str]:
    """(kind, target) of an edit that is not true of the scene."""
    if rng.random() < shares.open:
        return "open", varied_target(rng, shares, held_out)
    if family == "caption":
        return "captions", _pick(scenes, rng, scene, 2).answer("caption")
    if rng.random() < shares.novel_names:
        return "novel_names", novel_word(rng)
    values = SHAPES if family == "shape" else COLORS
    return "corrections", rng.choice([v for v in values if v != scene.answer(family)])


def varied_target(rng: random.Random, shares: Shares, held_out: bool) -> str:
    """An open target, now and then two in one, or with a word said twice."""
    target = open_target(rng, held_out)
    if rng.random() < shares.doubled:
        longer = f"{target} {open_target(rng, held_out)}"
        target = longer if len(longer) <= DOUBLED_LENGTH else target
    if shares.repeated and rng.random() < shares.repeated:
        target = f"{target} {rng.choice(target.split())}"
    return target


def drawn_samples(
    count: int,
    scenes: list[Scene],
    seed: str,
    held_out: bool,
    shares: Shares = EVAL_SHARES,
    palette: int = 0,
) -> list[EditSample]:
    """Edit samples about different facts of the scenes.

    No locality query asks for a fact that any of the samples edits. held_out: text generality on
    the phrasings that training never uses, locality on all, open targets of held-out words; else
    training phrasings and words only.
    Raises ValueError if the scenes have no room for so many edits.
    """
    rng = random.Random(seed)
    facts = [(scene, family) for scene in scenes for family in FAMILIES]
    rng.shuffle(facts)
    free = {scene: list(FAMILIES) for scene in scenes}  # the questions that are not edited
    edits = []
    for scene, family in facts:
        if len(edits) < count and len(free[scene]) > 1:  # one of each scene stays for locality
            free[scene].remove(family)
            edits.append((scene, family))
    similar = [
        [other for other in _neighbors(scene) if family in free.get(other, ())]
        for scene, family in edits
    ]
    if len(edits) < count or not all(similar):
        scarce = f"{len(scenes)} scenes lack room for {count} edits; about {len(facts) // 2} fit"
        raise ValueError(f"the drawn world's {scarce}")
    texts, samples = text_questions(), []
    for (scene, family), neighbors in zip(edits, similar, strict=True):
        trained = PHRASINGS[family][:-HELD_OUT]
        kind, target = edit_target(scene, family, scenes, rng, shares, held_out)
        prompt, fact, drawing = rng.choice(trained), (scene, family), _draw(scene, rng, palette)
        rephrasings = PHRASINGS[family][-HELD_OUT:] if held_out else trained
        rephrased = rng.choice([phrase for phrase in rephrasings if phrase != prompt])
        _, question, answer = rng.choice(texts)
        far = _pick(scenes, rng, scene, 3)
        far_family, other_family = rng.choice(free[far]), rng.choice(free[scene])
        queries = {
            "reliability": Query(drawing, prompt, target, fact),
            "text_generality": Query(drawing, rephrased, target, fact),
            "modal_generality": Query(_draw(scene, rng, palette), prompt, target, fact),
            "text_locality": Query(None, question, answer, ("text", question)),
            "modal_locality": _ask(_draw(far, rng, palette), far_family, rng, held_out),
            "same_image": _ask(drawing, other_family, rng, held_out),
        }
        picture = _draw(rng.choice(neighbors), rng, palette)
        near = Query(picture, prompt, picture.scene.answer(family), (picture.scene, family))
        queries["similar_image"] = near
        queries["no_image"] = Query(None, prompt, "no image", ("text", prompt))
        samples.append(EditSample(kind, queries))
    return samples


def _draw(scene: Scene, rng: random.Random, palette: int) -> Drawing:
    return Drawing(scene, rng.randrange(2_000_000, 2**31), palette)


def _ask(drawing: Drawing, family: str, rng: random.Random, held_out: bool) -> Query:
    """A question that is not edited, in any phrasing or one of the training's."""
    phrasings = PHRASINGS[family] if held_out else PHRASINGS[family][:-HELD_OUT]
    scene = drawing.scene
    return Query(drawing, rng.choice(phrasings), scene.answer(family), (scene, family))


def drawn_stream(edits: int, seed: int) -> list[EditSample]:
    """The evaluation stream: held-out scenes, text generality on held-out phrasings."""
    return drawn_samples(edits, split_scenes()[1], f"stream {seed}", held_out=True)
