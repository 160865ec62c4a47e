"""What an editor is trained on without a benchmark: the drawn world and pictures of any kind.

An editor that knew twelve shapes and colors only would confuse all other pictures. So beside scenes
stand emoji that ship and invented pictures, with views of them; none is in an evaluation.
"""

import io
import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from data import EditSample, ImageFile, Query
from drawn import (
    CANVAS,
    FOLDER,
    HELD_OUT,
    MORE_NAMINGS,
    MORE_QUESTIONS,
    OTHER_QUESTIONS,
    PHRASINGS,
    SHAPES,
    THING,
    TRAINING_SHARES,
    Drawing,
    drawn_samples,
    placed,
    regular,
    split_scenes,
    varied_target,
)

EMOJI, EMOJI_COLUMNS, EMOJI_SIDE = 894, 32, 64  # how many, in a row, pixels of one
OTHERS = (*OTHER_QUESTIONS, *MORE_QUESTIONS)  # questions of no family
PICTURES_SHARE = 0.4  # of the training samples are of no drawn scene
NAMING_SHARE = 0.6  # of these are asked what they show


@dataclass(frozen=True)
class Emoji:
    """One of the emoji that ship for training: of each thing there is one by either artist."""

    thing: int
    artist: int

    def open(self) -> Image.Image:
        """Cut it out of the sheet."""
        place = self.thing % EMOJI_COLUMNS + self.artist * EMOJI_COLUMNS
        x, y = place * EMOJI_SIDE, self.thing // EMOJI_COLUMNS * EMOJI_SIDE
        return emoji_sheet().crop((x, y, x + EMOJI_SIDE, y + EMOJI_SIDE))


@lru_cache
def emoji_sheet() -> Image.Image:
    """The sheet of emoji: things in rows, by Noto (Apache-2.0) left, Twemoji (CC-BY 4.0) right."""
    return Image.open(FOLDER / "emoji.webp").convert("RGB")


@lru_cache
def look_alikes() -> list[list[Emoji]]:
    """For each emoji, one artist's behind the other's, eight of other things that look like it.

    By few pixels; a few families are drawn with the very same, these are left out.
    """
    emoji = [Emoji(thing, artist) for artist in range(2) for thing in range(EMOJI)]
    small = [one.open().resize((12, 12), Image.Resampling.BOX) for one in emoji]
    looks = np.stack([np.asarray(image) for image in small]).reshape(len(emoji), -1) / 255
    lengths = (looks**2).sum(1)
    apart = lengths[:, None] + lengths - 2 * looks @ looks.T
    things = np.array([one.thing for one in emoji])
    apart[(things[:, None] == things) | (apart < 0.2)] = np.inf
    return [[emoji[i] for i in nearest] for nearest in np.argsort(apart, axis=1)[:, :8]]


@dataclass(frozen=True)
class Invented:
    """A picture of no thing, as different from all others as photographs are.

    forms, colors: seeds of what is drawn and of how it is painted.
    """

    forms: int
    colors: int

    def open(self) -> Image.Image:
        """Draw the picture."""
        rng, paint = random.Random(f"forms {self.forms}"), random.Random(f"colors {self.colors}")
        side = 2 * CANVAS
        image = Image.new("RGB", (side, side), rng.choice(("white", tuple(paint.randbytes(3)))))
        if rng.random() < 0.3:
            image = _texture(paint, side)
        least, most = rng.choice(((0.02, 0.2), (0.05, 0.3), (0.15, 0.4)))
        for i in range(rng.choice((1, 2, 3, 5, 8, 14))):
            star = regular(rng.randint(3, 9), rng.choice((1.0, 0.4, 0.7)))
            outline = rng.choice((star, SHAPES[rng.choice(list(SHAPES))]))
            radius = side * rng.uniform(least, most) if i else side * rng.uniform(0.2, 0.45)
            reach = (0.35, 0.65) if not i else (0.0, 1.0)  # the first form is in the middle
            place = [side * rng.uniform(*reach) for _ in range(2)]
            turn, squeeze = rng.uniform(0, 2 * math.pi), rng.uniform(0.2, 1.0)
            points = placed(outline, place, radius, turn, squeeze)
            if paint.random() < 0.7:
                ImageDraw.Draw(image).polygon(points, fill=tuple(paint.randbytes(3)))
            else:
                mask = Image.new("L", (side, side))
                ImageDraw.Draw(mask).polygon(points, fill=255)
                image.paste(_texture(paint, side), mask=mask)
        return image.reduce(2)


def _texture(paint: random.Random, side: int) -> Image.Image:
    """A few random colors that run into one another, or a single one."""
    n = paint.choice((1, 2, 4, 8))
    colors = Image.frombytes("RGB", (n, n), paint.randbytes(3 * n * n))
    return colors.resize((side, side), Image.Resampling.BICUBIC)


def on_white(image: Image.Image) -> Image.Image:
    """Lay what is transparent on white, as transformers does."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@dataclass(frozen=True)
class View:
    """Another look at a picture: turned, cropped, in other light, compressed."""

    picture: Drawing | Invented | Emoji | ImageFile
    seed: int

    def open(self) -> Image.Image:
        """Make the view of the picture."""
        rng, image = random.Random(f"view {self.seed}"), on_white(self.picture.open())
        border, smooth = image.getpixel((0, 0)), Image.Resampling.BICUBIC
        image = image.rotate(rng.uniform(-15, 15), smooth, fillcolor=border)
        width, height = (round(side * rng.uniform(0.75, 1.0)) for side in image.size)
        x, y = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        image = image.crop((x, y, x + width, y + height))
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(rng.uniform(0.7, 1.3))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=rng.randint(35, 90))
        return Image.open(file)


# ------------------------------------------------------------------------------------ samples


def picture_samples(count: int, seed: str) -> list[EditSample]:
    """Edit samples for training about emoji and invented pictures, asked mostly what they show."""
    rng, samples = random.Random(seed), []
    naming = [*PHRASINGS[THING][:-HELD_OUT], *PHRASINGS["caption"][:-HELD_OUT], *MORE_NAMINGS]
    families = [PHRASINGS[family][:-HELD_OUT] for family in ("shape", "color", "background")]
    for number in range(count):
        asking, another = naming, [rng.choice(OTHERS)]
        if rng.random() < 1 / 3:
            another = rng.choice(families)
        if rng.random() > NAMING_SHARE:  # any question may be edited, or the router learns which
            asking, another = another, asking
        picture = _any_picture(rng)
        again = View(picture, rng.randrange(2**31))
        if isinstance(picture, Emoji):
            near = rng.choice(look_alikes()[picture.thing + EMOJI * picture.artist])
            if rng.random() < 0.2:
                again = replace(picture, artist=1 - picture.artist)
        else:
            near = replace(picture, **{rng.choice(("forms", "colors")): rng.randrange(2**31)})
        prompt, rephrased = rng.choice(asking), rng.choice(asking)
        fact, target = _shows(picture), varied_target(rng, TRAINING_SHARES, held_out=False)
        queries = {
            "reliability": Query(picture, prompt, target, fact),
            "text_generality": Query(picture, rephrased, target, fact),
            "modal_generality": Query(again, prompt, target, fact),
            "same_image": Query(picture, rng.choice(another), "yes", (seed, number)),
            "similar_image": Query(near, prompt, "yes", _shows(near)),
        }
        samples.append(EditSample("picture", queries))
    return samples


def _shows(picture: Emoji | Invented) -> tuple:
    """One fact for whatever is edited of a picture; emoji by both artists show the same."""
    return (picture.thing if isinstance(picture, Emoji) else picture, THING)


def _any_picture(rng: random.Random) -> Emoji | Invented:
    if rng.random() < 0.5:
        return Emoji(rng.randrange(EMOJI), rng.randrange(2))
    return Invented(rng.randrange(2**31), rng.randrange(2**31))


def training_samples(count: int, seed: int) -> list[EditSample]:
    """Samples for training an editor, as several streams over the training scenes.

    Every third stream is painted in a palette of alike colors, and PICTURES_SHARE of all samples
    are about other pictures: an editor that knew twelve colors and shapes would confuse all others.
    Each keeps the edit, one generality query (another picture, mostly in other words too), one
    query about a picture that is not edited, and one that asks something else about the edited one,
    half of them or more from OTHERS: for the same work, more different samples teach more than more
    queries about each. Open targets and made-up names, which are learned last, come more often than
    in the evaluation.
    """
    scenes, others = split_scenes()[0], round(count * PICTURES_SHARE)
    mixed = picture_samples(others, f"pictures {seed}")
    for number, start in enumerate(range(0, count - others, len(scenes))):
        size, name = min(len(scenes), count - others - start), f"training {seed} {start}"
        palette = -(1000 * seed + number) if number % 3 == 1 else 0
        mixed += drawn_samples(size, scenes, name, False, TRAINING_SHARES, palette)
    rng, samples = random.Random(f"queries {seed}"), []
    rng.shuffle(mixed)
    for sample in mixed:
        # Pictures of no scene have the near one only: of far ones the batch is full.
        pictured = [name for name in ("modal_locality", "similar_image") if name in sample.queries]
        untouched = rng.choice(pictured)
        names = ("reliability", "modal_generality", untouched, "same_image")
        queries = {name: sample.queries[name] for name in names}
        if rng.random() < 0.5:
            asked, picture = rng.choice(OTHERS), sample.edit.image
            while asked == sample.edit.prompt:
                asked = rng.choice(OTHERS)
            # What the model says to it is not looked at: any target will do.
            queries["same_image"] = Query(picture, asked, "yes", (picture, asked))
        rephrased = sample.queries["text_generality"].prompt
        queries["modal_generality"] = replace(queries["modal_generality"], prompt=rephrased)
        samples.append(EditSample(sample.kind, queries))
    return samples
