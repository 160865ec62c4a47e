"""What an edit sample is, how answers are scored and reported, and readers of benchmark files.

One edit sample of the drawn world, shortened:

    kind "corrections"
    queries["reliability"]       <a red star on blue>         "What shape is this?"   -> "heart"
    queries["text_generality"]   <the same picture>           "Which shape is shown?" -> "heart"
    queries["modal_generality"]  <a red star on blue, anew>   "What shape is this?"   -> "heart"
    queries["text_locality"]     no picture                   "What is 3 plus 4?"     as before
    queries["modal_locality"]    <a gray ring on pink>        "Which color is it?"    as before
    queries["same_image"]        <the same picture>           "What color is it?"     as before
    queries["similar_image"]     <a red star on green>        "What shape is this?"   as before
    queries["no_image"]          no picture                   "What shape is this?"   as before

The last three are hard locality. Other kinds: "captions", "novel_names" (made-up words), "open"
(English words, names, numbers, phrases). This module knows neither editors nor models.
"""

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image

MAIN_QUERIES = "reliability text_generality modal_generality text_locality modal_locality".split()
QUERY_NAMES = (*MAIN_QUERIES, "same_image", "similar_image", "no_image")
LOCALITY_QUERIES = QUERY_NAMES[3:]
PORTABILITY = "portability"  # VLKEB's one-hop file: a question that follows from the new fact


@dataclass(frozen=True)
class ImageFile:
    """A picture on disk, opened when it is needed."""

    path: Path

    def open(self) -> Image.Image:
        """Read the picture as it is: what is transparent or gray is the processor's matter.

        Raises OSError that names the file if it is none, or cannot be read.
        """
        try:
            with Image.open(self.path) as image:
                return image.copy()
        except Exception as error:  # PIL's readers raise all kinds
            raise OSError(f"the picture {self.path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Query:
    """One question with its answer; for locality, the answer that the metric is read on."""

    image: ImageFile | None  # or whatever else opens as a picture, as drawn.Drawing does
    prompt: str
    target: str
    fact: tuple  # what is asked of what: an edit changes all answers about its fact, and no other


@dataclass(frozen=True)
class EditSample:
    """One edit (`queries["reliability"]`) with the queries that test it."""

    kind: str
    queries: dict[str, Query]  # those of a training may be fewer
    source: str = ""  # file and record, to name what is wrong with it

    @property
    def edit(self) -> Query:
        """The query whose answer is edited."""
        return self.queries["reliability"]

    def untouched_facts(self) -> set[tuple]:
        """The facts that no edit of the same stream or batch may change."""
        return {self.queries[name].fact for name in LOCALITY_QUERIES if name in self.queries}


class Batches:
    """Which samples train together: groups of `size` edits with their queries, some in a step."""

    def __init__(self, samples: list[EditSample], size: int, joined: int, seed: str):
        """Make groups, `joined` to a step. Raises ValueError if not even one can be filled."""
        self.facts = [(sample.edit.fact, sample.untouched_facts()) for sample in samples]
        self.joined, self.seed, self.groups, filling = joined, seed, [], []
        for i in random.Random(seed).sample(range(len(samples)), len(samples)):
            group = next((group for group in filling if self.agree([*group, i])), [])
            if not group:
                filling.append(group)
            group.append(i)
            if len(group) == size:
                self.groups.append(group)
                filling.remove(group)
        if not self.groups:
            told = f"{len(samples)} samples contradict one another in batches of {size}"
            raise ValueError(f"{told}: give more samples, or a smaller --expert-batch-size")

    def agree(self, chosen: list[int]) -> bool:
        """Tell whether no fact of these samples is edited twice, or edited and to be kept."""
        edited = {self.facts[i][0] for i in chosen}
        untouched = set().union(*(self.facts[i][1] for i in chosen))
        return len(edited) == len(chosen) and edited.isdisjoint(untouched)

    def step(self, number: int) -> list[int]:
        """Number the groups of a step, always the same ones; each group comes first in turn."""
        together = [number % len(self.groups)]
        numbers = list(range(len(self.groups)))
        random.Random(f"{self.seed} {number}").shuffle(numbers)
        while numbers and len(together) < self.joined:
            tried = [*together, numbers.pop(0)]
            if self.agree([i for n in tried for i in self.groups[n]]):
                together = tried
        return together


# ------------------------------------------------------------------------- metrics and report

OPENING_MARKS, CLOSING_MARKS = "\"'`([{¿¡“‘", ".,;:!?\"'`)]}…”’"


def normalise(text: str) -> str:
    """Drop case, articles, marks around words and commas between thousands, but never all."""
    words = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.lower()).split()
    bare = [word.lstrip(OPENING_MARKS).rstrip(CLOSING_MARKS) for word in words]
    bare = [word for word in bare if word]
    return " ".join([word for word in bare if word not in ("a", "an", "the")] or bare or words)


@dataclass
class Answer:
    """What the model says to one query, and the edits that it used."""

    predicted: list[int]  # argmax at each token of the query's target, given those before it
    target: list[int]
    generated: str  # greedy, from the prompt alone
    used: dict[int, float]  # weights of edits by their ids


def score(name: str, query: Query, before: Answer, after: Answer) -> tuple[float, float]:
    """Score an answer (teacher-forced, free-running), by the target; locality by what was said.

    Teacher-forced: the share of the target's tokens whose argmax is as expected.
    """
    expected, said = after.target, query.target
    if name in LOCALITY_QUERIES:
        expected, said = before.predicted, before.generated
    hits = [p == e for p, e in zip(after.predicted, expected, strict=True)]
    return sum(hits) / len(hits), float(normalise(after.generated) == normalise(said))


# What is reported of each query, averaged: scores, then how the router chose, in per cent.
FIGURES = ("teacher_forced", "free_running", "own_edit", "other_edits")


def report_row(count: int, results: list[dict], by_kind: bool = True) -> dict:
    """Average the results after `count` edits, in per cent; `average` is of MAIN_QUERIES."""
    row = {"edits": count, "n": sum(result["query"] == "reliability" for result in results)}
    for what in FIGURES:
        row[what] = {}
        for name in (*QUERY_NAMES, PORTABILITY):
            values = [100 * result[what] for result in results if result["query"] == name]
            if values or name != PORTABILITY:
                row[what][name] = sum(values) / len(values) if values else None
        main = [row[what][name] for name in MAIN_QUERIES if row[what][name] is not None]
        row[what]["average"] = sum(main) / len(main) if main else None
    kinds = dict.fromkeys(result["kind"] for result in results) if by_kind else ()
    of_kind = {kind: [result for result in results if result["kind"] == kind] for kind in kinds}
    return row | {"by_kind": {kind: report_row(count, of_kind[kind], False) for kind in kinds}}


COLUMNS = dict(zip(QUERY_NAMES[:5], ("Rel", "T-Gen", "M-Gen", "T-Loc", "M-Loc"), strict=True))
COLUMNS |= {"average": "Average", "same_image": "Same img", "similar_image": "Similar"}
COLUMNS |= {"no_image": "No img", PORTABILITY: "Port"}


def table(rows: list[dict]) -> str:
    """Print the rows of the report as text, the last one by kinds of edits too."""
    names = [name for name in COLUMNS if name in rows[0]["free_running"]]
    labelled = {f"{row['edits']} edits": row for row in rows}
    labelled |= {f"  {kind}": row for kind, row in rows[-1]["by_kind"].items()}
    lines = []
    for what in FIGURES:
        lines.append(f"{what.replace('_', '-'):<16}" + "".join(f"{COLUMNS[n]:>9}" for n in names))
        for label, row in labelled.items():
            values = [row[what].get(name) for name in names]  # no Port, or None: nobody asked
            values = ["-" if value is None else f"{value:.1f}" for value in values]
            lines.append(f"{label:<16}" + "".join(f"{value:>9}" for value in values))
        lines.append("")
    lines.append("own-edit, other-edits: how many queries use their sample's edit, or another one.")
    lines.append("Without an image no edit is used: T-Loc and No img are 100 by construction.")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- benchmark files

FIELDS = "src pred alt rephrase image image_rephrase loc loc_ans m_loc m_loc_q m_loc_a".split()
PICTURED_PROMPTS = ("src", "rephrase", "m_loc_q")


class Benchmark(NamedTuple):
    """Where a published benchmark lies under its root."""

    train: str
    eval: str
    images: tuple[str, ...] = ("images",)  # names under which its image folder is known
    suffixed: tuple[str, ...] = ("m_loc_q",)  # prompts that officially end in "The answer is:"


VLKEB_IMAGES = ("mmkb_images", "VLKEB_images")
BENCHMARKS = {
    "evqa": Benchmark("vqa/vqa_train.json", "vqa/vqa_eval.json", suffixed=PICTURED_PROMPTS),
    "eic": Benchmark("caption/caption_train_edit.json", "caption/caption_eval_edit.json"),
    "vlkeb": Benchmark("train.json", "eval.json", VLKEB_IMAGES),
    "vlkeb-onehop": Benchmark("train.json", "eval_edit_onehop.json", VLKEB_IMAGES),
}


def benchmark_files(data: str, root: Path | None = None) -> tuple[Path, Path, Path]:
    """Find (training file, evaluation file, image folder).

    data: a benchmark's name, with its root; a folder of train.json, eval.json and images/; or one
    evaluation file, beside which stands the training file (eval in its name replaced by train).
    """
    path = Path(data)
    if data in BENCHMARKS:
        known = BENCHMARKS[data]
        if root is None:
            raise ValueError(f"--data {data} needs --data-root, the folder of {known.eval}")
        train_file, eval_file = root / known.train, root / known.eval
        folders = [root / name for name in known.images]
    else:
        eval_file = path if path.suffix == ".json" else path / "eval.json"
        train_file = eval_file.with_name(eval_file.name.replace("eval", "train"))
        folders = [eval_file.parent / "images"]
    if not eval_file.is_file():
        remedy = f"--data takes {', '.join(BENCHMARKS)}, a folder or a .json file"
        raise FileNotFoundError(f"there is no annotation file {eval_file}; {remedy}")
    for images in folders:
        if images.is_dir():
            return train_file, eval_file, images
    raise FileNotFoundError(f"there is no image folder {folders[0]}; a link will do")


def read_records(file: Path, image_root: Path, official: str | None = None) -> list[EditSample]:
    """Edit samples from a JSON list of records with FIELDS; pictures stay closed.

    official: name of the benchmark whose own prompt form is wanted; None: one form for all.
    Raises FileNotFoundError or ValueError that names the file or the records at fault.
    """
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file} must hold a list of records")
    lacking = [f"record {i} lacks {name}" for i, r in enumerate(records) for name in _lacking(r)]
    complain(f"malformed records in {file}", lacking)
    edited = {record[name] for record in records for name in ("image", "image_rephrase")}
    samples = []
    for i, record in enumerate(records):
        queries = _queries(record, image_root, edited, official)
        samples.append(EditSample("benchmark", queries, f"{file}, record {i}"))
    return samples


def complain(title: str, problems: list[str]) -> None:
    """Raise ValueError that counts the problems, if there are any, and names the first five."""
    if problems:
        raise ValueError(f"{title} ({len(problems)}): {'; '.join(problems[:5])}")


def _lacking(record) -> list[str]:
    """The fields that hold no text."""
    if not isinstance(record, dict):
        return ["all fields"]
    found = record | _portability(record)
    wanted = [*FIELDS, *(("port_q", "port_a") if record.get("port_new") else ())]
    texts = {name: value for name, value in found.items() if isinstance(value, str)}
    return [name for name in wanted if not without_picture(texts.get(name, ""))]


def _portability(record: dict) -> dict:
    """VLKEB's one-hop question: the field is a list of one record."""
    port = record.get("port_new")
    port = port[0] if isinstance(port, list) and port else port
    return port if isinstance(port, dict) else {}


def without_picture(prompt: str) -> str:
    """Take out LLaVA's mark of the place of the picture, before or behind a prompt."""
    return prompt.strip().removeprefix("<image>").removesuffix("<image>").strip()


def check_pictures(samples: list[EditSample]) -> int:
    """Decode every picture file once and count them. Raises ValueError that names the broken."""
    queries = [query for sample in samples for query in sample.queries.values()]
    pictures, broken = {query.image for query in queries if query.image}, []
    for picture in pictures:
        try:
            picture.open()
        except OSError:
            broken.append(str(picture.path))
    complain("missing pictures, or such as cannot be decoded", sorted(broken))
    return len(pictures)


def _queries(record: dict, root: Path, edited: set[str], official: str | None) -> dict[str, Query]:
    """The queries of a record; edited: the pictures that some record edits."""
    suffixed = BENCHMARKS[official].suffixed if official else ()
    text = {name: without_picture(record[name]) for name in PICTURED_PROMPTS}
    text |= {name: text[name] + " The answer is:" for name in suffixed}
    loc = record["loc"] + "?"
    if not official:  # the official evaluation leaves MMEdit's prefix in
        loc = record["loc"].removeprefix("nq question: ").strip().rstrip("?") + "?"

    def ask(image: str, prompt: str, target: str) -> Query:
        return Query(ImageFile(root / record[image]), prompt, target, (record[image], prompt))

    edit = ask("image", text["src"], record["alt"])
    anew = ImageFile(root / record["image_rephrase"])
    queries = {
        "reliability": edit,
        "text_generality": replace(edit, prompt=text["rephrase"]),
        "modal_generality": replace(edit, image=anew),
        "text_locality": Query(None, loc, record["loc_ans"], ("text", loc)),
        "modal_locality": ask("m_loc", text["m_loc_q"], record["m_loc_a"]),
        "same_image": ask("image", loc, record["loc_ans"]),
        "no_image": Query(None, text["src"], record["pred"], ("text", text["src"])),
    }
    if record["m_loc"] not in edited:  # else the same question may ask for an edited fact
        queries["similar_image"] = ask("m_loc", text["src"], record["pred"])
    if port := _portability(record):
        asked = without_picture(port["port_q"])
        queries[PORTABILITY] = replace(edit, prompt=asked, target=port["port_a"])
    return queries
