"""What an edit sample is, and where samples come from: a drawn world with no downloads, or the field's benchmark files.

One edit sample of the drawn world, shortened:

    kind "corrections"
    queries["reliability"]       <a red star on blue>         "What shape is this?"           -> "heart"   (the edit)
    queries["text_generality"]   <the same picture>           "Which shape can you see here?" -> "heart"
    queries["modal_generality"]  <a red star on blue, anew>   "What shape is this?"           -> "heart"
    queries["text_locality"]     no picture                   "What is 3 plus 4?"             as before
    queries["modal_locality"]    <a gray ring on pink>        "Name the color of the shape."  as before
    queries["same_image"]        <the same picture>           "What color is the shape?"      as before
    queries["similar_image"]     <a red star on green>        "What shape is this?"           as before
    queries["no_image"]          no picture                   "What shape is this?"           as before

The last three are hard locality. This module knows neither editors nor models.
"""

import json
import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

QUERY_NAMES = ("reliability", "text_generality", "modal_generality", "text_locality", "modal_locality",
               "same_image", "similar_image", "no_image")
GENERALITY = QUERY_NAMES[1:3]
LOCALITY = QUERY_NAMES[3:]
PORTABILITY = "portability"  # beside them in samples of VLKEB's one-hop file: a question whose answer follows from the new fact
KINDS = ("corrections", "novel_names", "captions")


# ------------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True)
class ImageFile:
    """A picture on disk, opened when it is needed."""

    path: Path

    def open(self) -> Image.Image:
        with Image.open(self.path) as image:
            return image.convert("RGB")


@dataclass(frozen=True)
class Query:
    """One question. `target` is the expected answer; for locality it is the answer that the metric is read on.

    `fact` names what is asked of what: an edit of a fact changes the answer of every query with that fact and of no other.
    """

    image: "Drawing | ImageFile | None"
    prompt: str
    target: str
    fact: tuple


@dataclass(frozen=True)
class EditSample:
    """One edit (`queries["reliability"]`) with the queries that test it; `queries` may lack hard-locality names."""

    kind: str
    queries: dict[str, Query] = field(hash=False)

    @property
    def edit(self) -> Query:
        return self.queries["reliability"]

    def untouched_facts(self) -> set[tuple]:
        """The facts that no edit of the same stream or batch may change."""
        return {self.queries[name].fact for name in LOCALITY if name in self.queries}


# ------------------------------------------------------------------------------------------------ the drawn world

COLORS = {
    "red": (220, 30, 35), "orange": (250, 140, 20), "yellow": (245, 225, 50), "green": (30, 150, 60),
    "blue": (35, 70, 210), "purple": (125, 40, 150), "pink": (250, 165, 195), "brown": (115, 70, 35),
    "black": (15, 15, 15), "white": (245, 245, 245), "gray": (135, 135, 135), "cyan": (60, 205, 225),
}
CANVAS = 96  # pixels; pictures are drawn at twice this size and averaged down, so that edges are smooth


def _regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """A regular polygon, or a star where every second corner lies at radius `inner`."""
    count = corners if inner == 1.0 else 2 * corners
    radii = (1.0, inner)
    return [(radii[i % 2] * math.sin(2 * math.pi * i / count), -radii[i % 2] * math.cos(2 * math.pi * i / count))
            for i in range(count)]


def _arc(radius: float, start: float, end: float, center: tuple[float, float] = (0.0, 0.0)) -> list[tuple[float, float]]:
    """Points on a circle from angle `start` to `end` in degrees."""
    steps = [math.radians(start + (end - start) * i / 40) for i in range(41)]
    return [(center[0] + radius * math.cos(a), center[1] + radius * math.sin(a)) for a in steps]


def _heart() -> list[tuple[float, float]]:
    steps = [2 * math.pi * i / 60 for i in range(60)]
    return [(math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
            for t in steps]


def _fit(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Scale an outline so that its farthest point lies on the unit circle: then no turn can move it out of the canvas."""
    reach = max(math.hypot(x, y) for x, y in points)
    return [(x / reach, y / reach) for x, y in points]


# Outlines as polygons in the unit circle, before turning and scaling.
SHAPES = {name: _fit(points) for name, points in {
    "circle": _arc(0.9, 0, 360),
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "triangle": _regular(3),
    "star": _regular(5, 0.42),
    "heart": _heart(),
    "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
              (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    "crescent": _arc(1.0, 50, 310) + _arc(0.78, 282, 78, (0.45, 0.0)),
    "ring": _arc(0.95, 0, 360) + _arc(0.5, 360, 0),
    "arrow": [(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)],
    "hourglass": [(-0.8, -1), (0.8, -1), (0.12, 0), (0.8, 1), (-0.8, 1), (-0.12, 0)],
    "bar": [(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)],
    "stairs": [(-0.9, -0.9), (-0.3, -0.9), (-0.3, -0.3), (0.3, -0.3), (0.3, 0.3), (0.9, 0.3), (0.9, 0.9), (-0.9, 0.9)],
}.items()}


@dataclass(frozen=True, order=True)
class Scene:
    """What a picture shows; size, place and angle are no part of it."""

    shape: str
    color: str
    background: str

    def answer(self, family: str) -> str:
        """The true answer to a question of one family."""
        return f"a {self.color} {self.shape} on a {self.background} background" if family == "caption" else getattr(self, family)

    def differences(self, other: "Scene") -> int:
        return (self.shape != other.shape) + (self.color != other.color) + (self.background != other.background)


@dataclass(frozen=True)
class Drawing:
    """One picture of a scene: `seed` decides size, place, angle and shade."""

    scene: Scene
    seed: int

    def open(self) -> Image.Image:
        rng = random.Random(f"{self.scene.shape} {self.scene.color} {self.scene.background} {self.seed}")
        shade = lambda name: tuple(min(255, max(0, c + rng.randint(-10, 10))) for c in COLORS[name])
        side = 2 * CANVAS
        image = Image.new("RGB", (side, side), shade(self.scene.background))
        radius = side * rng.uniform(0.28, 0.45)
        x, y = (rng.uniform(radius, side - radius) for _ in range(2))
        turn = rng.uniform(0, 2 * math.pi)
        cos, sin = radius * math.cos(turn), radius * math.sin(turn)
        points = [(x + cos * px - sin * py, y + sin * px + cos * py) for px, py in SHAPES[self.scene.shape]]
        ImageDraw.Draw(image).polygon(points, fill=shade(self.scene.color))
        return image.reduce(2)


SCENES = [Scene(s, c, b) for s in SHAPES for c in COLORS for b in COLORS if c != b]
FAMILIES = ("shape", "color", "background", "caption")

# The last HELD_OUT phrasings of each family never occur in the editor's training: text generality is measured on them.
HELD_OUT = 4
PHRASINGS = {
    "shape": (
        "What shape is this?", "Which shape is shown?", "What shape do you see?", "Name the shape in the picture.",
        "What is the shape in this image?", "Which shape is in the picture?", "What figure is drawn here?",
        "Tell me the shape.", "What shape has been drawn?", "Identify the shape.", "What form does the object have?",
        "Which figure does the image show?", "What kind of shape is it?", "The picture shows one shape. Which one?",
        "Can you name this shape?", "Say which shape is drawn.", "What is the name of the figure?",
        "Look at the image. What shape is there?", "What do we call this shape?", "Give the shape of the object.",
        "Which shape can you see here?", "What is this figure called?", "Please name the shape shown here.",
        "What shape does the object have?"),
    "color": (
        "What color is the shape?", "Which color does the shape have?", "What is the color of the shape?",
        "Name the color of the shape.", "What color is the figure?", "Which color is the object?",
        "Tell me the color of the figure.", "In which color is the shape drawn?", "What color has the shape been given?",
        "Identify the color of the shape.", "The shape has a color. Which one?", "What color does the figure have?",
        "Can you name the color of the shape?", "Say the color of the object.", "What is the object's color?",
        "Look at the shape. What color is it?", "Which color was used for the shape?", "Give the color of the shape.",
        "What color do you see on the shape?", "How is the shape colored?",
        "What is the color of the object?", "Which color does the figure have?", "Please name the color of the figure.",
        "In what color is the figure drawn?"),
    "background": (
        "What color is the background?", "Which color does the background have?", "What is the color of the background?",
        "Name the background color.", "What color is behind the shape?", "Which color is the background?",
        "Tell me the background color.", "On which color is the shape drawn?", "What color surrounds the shape?",
        "Identify the color of the background.", "The background has a color. Which one?", "What color lies around the figure?",
        "Can you name the color behind the figure?", "Say the color of the background.", "What is the background's color?",
        "Look behind the shape. What color is there?", "Which color was used for the background?",
        "Give the color of the background.", "What color do you see around the shape?", "How is the background colored?",
        "What is the color behind the object?", "Which background color can you see?",
        "Please name the color of the background.", "What color is around the object?"),
    "caption": (
        "Describe the image.", "What does the picture show?", "Write a caption for the image.", "Describe what you see.",
        "Give a caption.", "What is in the image?", "Describe this picture.", "Tell me what the image shows.",
        "Caption this image.", "What can be seen in the picture?", "Give a short description of the image.",
        "Put the picture into words.", "Summarize the image.", "What is this a picture of?",
        "Write down what you see.", "Say what is in the picture.", "Describe the whole scene.",
        "How would you describe the image?", "Write a sentence about the picture.", "What is going on in the image?",
        "Give a description of the picture.", "Please describe this image.", "Tell me what you see in the picture.",
        "What would be a caption for this picture?"),
}
OPPOSITES = (("hot", "cold"), ("big", "small"), ("old", "young"), ("fast", "slow"), ("up", "down"), ("left", "right"),
             ("open", "closed"), ("day", "night"), ("happy", "sad"), ("light", "dark"), ("early", "late"), ("full", "empty"))


def text_questions() -> list[tuple[str, str, str]]:
    """All text-only questions of the world as (family, question, answer): arithmetic and opposites."""
    questions = []
    for a in range(13):
        for b in range(13):
            questions += [("arithmetic", form.format(a=a, b=b), str(a + b))
                          for form in ("What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.")]
            if a >= b:
                questions += [("arithmetic", form.format(a=a, b=b), str(a - b))
                              for form in ("What is {a} minus {b}?", "How much is {a} minus {b}?", "Take {b} from {a}.")]
    for one, other in OPPOSITES:
        for word, answer in ((one, other), (other, one)):
            questions += [("opposites", form.format(word), answer)
                          for form in ("What is the opposite of {}?", "Name the opposite of {}.")]
    return questions


def novel_word(rng: random.Random) -> str:
    """A made-up word of two or three syllables: several tokens for any tokenizer."""
    onsets = ("b", "bl", "d", "dr", "f", "fl", "g", "gr", "j", "k", "kl", "l", "m", "n", "p", "pr", "r", "s", "sk", "t", "tr", "v", "w", "z")
    syllables = [rng.choice(onsets) + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3)))]
    return "".join(syllables) + rng.choice(("", "b", "k", "l", "m", "n", "p", "r", "s", "t", "x"))


# ------------------------------------------------------------------------------------------------ the drawn benchmark

EVAL_SHARE = 0.4  # of the scenes; the rest is for the editor's training


def _neighbors(scene: Scene) -> list[Scene]:
    """All scenes that differ in one attribute."""
    return ([replace(scene, shape=s) for s in SHAPES if s != scene.shape]
            + [replace(scene, color=c) for c in COLORS if c not in (scene.color, scene.background)]
            + [replace(scene, background=b) for b in COLORS if b not in (scene.color, scene.background)])


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """(training scenes, evaluation scenes): disjoint, and the same for every seed, so that editors and streams can be combined."""
    scenes = random.Random("split").sample(SCENES, len(SCENES))
    cut = round(EVAL_SHARE * len(scenes))
    return scenes[cut:], scenes[:cut]


def _pick(scenes: list[Scene], wanted, rng: random.Random) -> Scene:
    """A random scene that is wanted; most are, or there is at least one."""
    while not wanted(scene := rng.choice(scenes)):
        pass
    return scene


def _edit_target(scene: Scene, family: str, scenes: list[Scene], rng: random.Random, novel_share: float) -> tuple[str, str]:
    """(kind, target) of an edit that is not true of the scene."""
    if family == "caption":
        return "captions", _pick(scenes, lambda s: s.differences(scene) >= 2, rng).answer("caption")
    if rng.random() < novel_share:
        return "novel_names", novel_word(rng)
    values = SHAPES if family == "shape" else COLORS
    return "corrections", rng.choice([v for v in values if v != scene.answer(family)])


def drawn_samples(count: int, scenes: list[Scene], seed: str, held_out: bool, novel_share: float = 0.5) -> list[EditSample]:
    """Edit samples about different facts of the scenes; no locality query asks for a fact that any of the samples edits.

    held_out: text generality on the phrasings that training never uses, and locality on all phrasings; else training phrasings only.
    novel_share: of the edits that are no captions, how many have a made-up name as target.
    Raises ValueError if the scenes have no room for so many edits.
    """
    rng = random.Random(seed)
    facts = [(scene, family) for scene in scenes for family in FAMILIES]
    rng.shuffle(facts)
    edited_of = {scene: set() for scene in scenes}
    edits = []
    for scene, family in facts:
        if len(edits) < count and len(edited_of[scene]) < len(FAMILIES) - 1:  # one question of each scene stays for locality
            edited_of[scene].add(family)
            edits.append((scene, family))
    is_free = lambda scene, family: family not in edited_of[scene]
    free_neighbors = [[s for s in _neighbors(scene) if s in edited_of and is_free(s, family)] for scene, family in edits]
    if len(edits) < count or not all(free_neighbors):
        raise ValueError(f"{len(scenes)} scenes of the drawn world have no room for {count} edits with their locality queries; "
                         f"about {len(facts) // 2} fit")
    trained = lambda family: PHRASINGS[family][:-HELD_OUT]
    phrasings = (lambda family: PHRASINGS[family]) if held_out else trained
    rephrasings = (lambda family: PHRASINGS[family][-HELD_OUT:]) if held_out else trained
    draw = lambda scene: Drawing(scene, rng.randrange(2_000_000, 2**31))
    ask = lambda drawing, family, prompt: Query(drawing, prompt, drawing.scene.answer(family), (drawing.scene, family))
    texts = text_questions()
    samples = []
    for (scene, family), similar in zip(edits, free_neighbors):
        kind, target = _edit_target(scene, family, scenes, rng, novel_share)
        prompt, fact, drawing = rng.choice(trained(family)), (scene, family), draw(scene)
        rephrased = rng.choice([p for p in rephrasings(family) if p != prompt])
        _, question, answer = rng.choice(texts)
        far_scene = _pick(scenes, lambda s: s.differences(scene) == 3, rng)  # every scene has a question that is not edited
        far_family = rng.choice([f for f in FAMILIES if is_free(far_scene, f)])
        other_family = rng.choice([f for f in FAMILIES if is_free(scene, f)])
        samples.append(EditSample(kind, {
            "reliability": Query(drawing, prompt, target, fact),
            "text_generality": Query(drawing, rephrased, target, fact),
            "modal_generality": Query(draw(scene), prompt, target, fact),
            "text_locality": Query(None, question, answer, ("text", question)),
            "modal_locality": ask(draw(far_scene), far_family, rng.choice(phrasings(far_family))),
            "same_image": ask(drawing, other_family, rng.choice(phrasings(other_family))),
            "similar_image": ask(draw(rng.choice(similar)), family, prompt),
            "no_image": Query(None, prompt, "no image", ("text", prompt)),
        }))
    return samples


def drawn_stream(edits: int, seed: int) -> list[EditSample]:
    """The evaluation stream: held-out scenes, text generality on held-out phrasings."""
    return drawn_samples(edits, split_scenes()[1], f"stream {seed}", held_out=True)


UPDATE_FORMS = ("exact", "rephrased", "another picture")


class Update(NamedTuple):
    """A fact of the stream that is edited again."""

    sample: int  # index into the stream
    form: str  # one of UPDATE_FORMS: how the new edit asks for the fact
    edit: Query


def drawn_updates(stream: list[EditSample], count: int, seed: int) -> list[Update]:
    """`count` facts of a drawn stream, each edited again with another value of the world, in all forms in turn."""
    rng, updates = random.Random(f"updates {seed}"), []
    for n, i in enumerate(rng.sample(range(len(stream)), count)):
        form = UPDATE_FORMS[n % len(UPDATE_FORMS)]
        asked = stream[i].queries[("reliability", "text_generality", "modal_generality")[n % len(UPDATE_FORMS)]]
        scene, family = asked.fact
        target = asked.target
        while target == asked.target:
            target = _edit_target(scene, family, SCENES, rng, novel_share=0.0)[1]
        updates.append(Update(i, form, replace(asked, target=target)))
    return updates


def drawn_training(count: int, seed: int) -> list[EditSample]:
    """Samples for training an editor, as several streams over the training scenes.

    Each keeps the edit, one generality query, one locality query with an image and one without: for the same work, more different
    samples teach an editor more than more queries about each. Made-up names, which are learned last, come more often than in the evaluation.
    """
    scenes = split_scenes()[0]
    size = len(scenes)  # edits of one stream
    streams = [drawn_samples(min(size, count - start), scenes, f"training {seed} {start}", held_out=False, novel_share=0.65)
               for start in range(0, count, size)]
    rng = random.Random(f"queries {seed}")
    pictured = [name for name in LOCALITY if name not in ("text_locality", "no_image")]
    thinned = lambda queries: {name: queries[name] for name in ("reliability", rng.choice(GENERALITY), rng.choice(pictured), "text_locality")}
    return [EditSample(sample.kind, thinned(sample.queries)) for stream in streams for sample in stream]


def consistent_batches(samples: list[EditSample], size: int, rng: random.Random):
    """Endless batches of `size` indices into samples, each sample about equally often; in a batch no fact is edited twice
    and no locality query asks for an edited fact. Raises ValueError if the samples have no such batch."""
    if size < 2:
        raise ValueError(f"training needs batches of at least two edits; there are {len(samples)} training samples")
    facts = [sample.edit.fact for sample in samples]
    untouched = [sample.untouched_facts() for sample in samples]
    queue: list[int] = []
    while True:
        if len(queue) < 4 * size:
            queue += rng.sample(range(len(samples)), len(samples))
        batch, edited, kept, skipped = [], set(), set(), []
        for _ in range(2):  # what waits in the queue may not fill a batch: then a fresh round of all samples follows
            while queue and len(batch) < size:
                i = queue.pop(0)
                if facts[i] in edited or facts[i] in kept or edited & untouched[i]:
                    skipped.append(i)
                else:
                    batch.append(i)
                    edited.add(facts[i])
                    kept |= untouched[i]
            if len(batch) < size:
                queue += rng.sample(range(len(samples)), len(samples))
        if len(batch) < size:
            raise ValueError(f"no {size} of the {len(samples)} training samples fit into one batch without contradicting one another; "
                             "choose a smaller batch size")
        queue = skipped + queue
        yield batch


# ------------------------------------------------------------------------------------------------ benchmark files

FIELDS = ("src", "pred", "alt", "rephrase", "image", "image_rephrase", "loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a")
IMAGE_FIELDS = ("image", "image_rephrase", "m_loc")
PORTABILITY_FIELDS = ("port_q", "port_a")
THE_ANSWER_IS = " The answer is:"
NQ_PREFIX = "nq question: "


class Benchmark(NamedTuple):
    """Where a published benchmark lies under its root, and the fields whose prompts end in "The answer is:" in its official evaluation."""

    train: str
    eval: str
    images: tuple[str, ...]  # names under which its image folder is known
    official_suffix: tuple[str, ...]


_VLKEB_IMAGES = ("mmkb_images", "VLKEB_images")
BENCHMARKS = {
    "evqa": Benchmark("vqa/vqa_train.json", "vqa/vqa_eval.json", ("images",), ("src", "rephrase", "m_loc_q")),
    "eic": Benchmark("caption/caption_train_edit.json", "caption/caption_eval_edit.json", ("images",), ("m_loc_q",)),
    "vlkeb": Benchmark("train.json", "eval.json", _VLKEB_IMAGES, ("m_loc_q",)),
    "vlkeb-onehop": Benchmark("train.json", "eval_edit_onehop.json", _VLKEB_IMAGES, ("m_loc_q",)),
}


class Files(NamedTuple):
    """Annotation files and image folder of one data set."""

    train: Path
    eval: Path
    images: Path


def benchmark_files(data: str, root: Path | None = None, image_root: Path | None = None) -> Files:
    """The files of a benchmark's name with its root, of a folder with train.json, eval.json and images/, or of one evaluation file
    with the training file beside it (eval in its name replaced by train). Raises FileNotFoundError or ValueError naming what is missing."""
    if data in BENCHMARKS:
        known = BENCHMARKS[data]
        if root is None:
            raise ValueError(f"--data {data} needs --data-root, the folder that holds {known.eval}")
        found = next((root / name for name in known.images if (root / name).is_dir()), root / known.images[0])
        files = Files(root / known.train, root / known.eval, image_root or found)
    elif (path := Path(data)).suffix == ".json":
        files = Files(path.with_name(path.name.replace("eval", "train")), path, image_root or (root or path.parent) / "images")
    else:
        files = Files(path / "train.json", path / "eval.json", image_root or path / "images")
    if not files.eval.is_file():
        raise FileNotFoundError(f"there is no annotation file {files.eval}; --data takes {', '.join(BENCHMARKS)}, a folder or a .json file")
    if not files.images.is_dir():
        raise FileNotFoundError(f"there is no image folder {files.images}; --image-root names it")
    return files


def _complain(title: str, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{title} ({len(problems)}): {'; '.join(problems[:5])}{more}")


def _lacking(record: dict, fields: tuple[str, ...]) -> list[str]:
    return [f for f in fields if not (isinstance(record.get(f), str) and record[f].strip())]


def _portability(record: dict) -> dict | None:
    """VLKEB's one-hop question: the field is a list of one record."""
    port = record.get("port_new")
    return port[0] if isinstance(port, list) and port and isinstance(port[0], dict) else port


def _malformed(index: int, record) -> str | None:
    if not isinstance(record, dict):
        return f"record {index} is no object"
    lacking = _lacking(record, FIELDS)
    if record.get("port_new"):
        lacking += _lacking(port, PORTABILITY_FIELDS) if isinstance(port := _portability(record), dict) else ["port_new"]
    return f"record {index} lacks a text in {', '.join(lacking)}" if lacking else None


def read_records(file: Path, image_root: Path, official: str | None = None) -> list[EditSample]:
    """Edit samples from a JSON list of records with the field's 11 string fields (E-VQA, E-IC, VLKEB); pictures stay closed.

    official: name of the benchmark whose own prompt form is wanted; None is one form for all prompts.
    Raises FileNotFoundError or ValueError that names the file, records or missing pictures at fault, with their count.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no annotation file {file}")
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file} must hold a list of records, not {type(records).__name__} of length "
                         f"{len(records) if hasattr(records, '__len__') else 1}")
    _complain(f"malformed records in {file}", [problem for i, r in enumerate(records) if (problem := _malformed(i, r))])
    paths = sorted({image_root / r[f] for r in records for f in IMAGE_FIELDS})
    _complain(f"missing pictures of {file}", [str(path) for path in paths if not path.is_file()])
    edited = {r[f] for r in records for f in ("image", "image_rephrase")}
    return [_sample(r, image_root, edited, official) for r in records]


def check_pictures(samples: list[EditSample], progress=lambda paths: paths) -> int:
    """Decode every picture file of the samples once and return their number. Raises ValueError that names those that cannot be decoded.

    progress: wraps the list of paths, for instance tqdm.
    """
    paths = sorted({q.image.path for s in samples for q in s.queries.values() if isinstance(q.image, ImageFile)})
    _complain("pictures that cannot be decoded", [str(path) for path in progress(paths) if not _decodes(path)])
    return len(paths)


def _decodes(path: Path) -> bool:
    try:
        ImageFile(path).open()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def _sample(record: dict, image_root: Path, edited_images: set[str], official: str | None) -> EditSample:
    picture = {name: ImageFile(image_root / record[name]) for name in IMAGE_FIELDS}
    suffixed = BENCHMARKS[official].official_suffix if official else ()
    text = {name: record[name] + THE_ANSWER_IS * (name in suffixed) for name in ("src", "rephrase", "m_loc_q")}
    # The official evaluation appends a question mark and leaves MMEdit's prefix in.
    loc = record["loc"] + "?" if official else record["loc"].removeprefix(NQ_PREFIX).strip().rstrip("?") + "?"
    ask = lambda name, prompt, target: Query(picture[name], prompt, target, (record[name], prompt))
    edit = ask("image", text["src"], record["alt"])
    queries = {
        "reliability": edit,
        "text_generality": Query(edit.image, text["rephrase"], record["alt"], edit.fact),
        "modal_generality": Query(picture["image_rephrase"], text["src"], record["alt"], edit.fact),
        "text_locality": Query(None, loc, record["loc_ans"], ("text", loc)),
        "modal_locality": ask("m_loc", text["m_loc_q"], record["m_loc_a"]),
        "same_image": ask("image", loc, record["loc_ans"]),
        "no_image": Query(None, text["src"], record["pred"], ("text", text["src"])),
    }
    if record["m_loc"] not in edited_images:  # else the same question may ask for an edited fact
        queries["similar_image"] = ask("m_loc", text["src"], record["pred"])
    if record.get("port_new"):
        port = _portability(record)
        queries[PORTABILITY] = Query(edit.image, port["port_q"], port["port_a"], edit.fact)
    return EditSample("benchmark", queries)


def without_leaks(training: list[EditSample], stream: list[EditSample]) -> tuple[list[EditSample], int]:
    """Training samples without the locality questions that the evaluation asks too, and how many were left out."""
    asked = {fact for sample in stream for fact in sample.untouched_facts()}
    leaks = lambda name, query: name in LOCALITY and query.fact in asked
    kept = [EditSample(s.kind, {name: q for name, q in s.queries.items() if not leaks(name, q)}) for s in training]
    return kept, sum(len(s.queries) for s in training) - sum(len(s.queries) for s in kept)
