"""A first look: edits pictures with ordinary words and asks again; needs no training.

    python benchmarks/demo.py                        five words
    python benchmarks/demo.py "Mona Lisa" Kyoto 42   any others
    python benchmarks/demo.py --image cat.png "What is this?" Tom

Prints the answers before and after the edits, and writes them with their pictures to
output/demo.png.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from backbone import IGNORE
from benchmarks.figure import TITLES, draw_edits
from data import EditSample, ImageFile, Query
from drawn import PHRASINGS, THING, drawn_samples, split_scenes
from liveedit import LiveEdit
from run import answer, judge, load_model, question, set_up_process
from training_pictures import View

WORDS = ("Mona Lisa", "elephant", "2026", "golden retriever", "New York City")
GUITAR = ImageFile(ROOT / "assets" / "guitar.png")  # an emoji that no training has seen


def samples_of(words: list[str], seed: int) -> list[EditSample]:
    """Take pictures and questions about them, the last one real; the words are the new answers."""
    samples = drawn_words(words, seed)
    return [*samples[:-1], real_sample(GUITAR, "What is this?", words[-1], seed)]


def real_sample(image: ImageFile, prompt: str, word: str, seed: int) -> EditSample:
    """Edit a picture from a file, and ask again: in other words, of a view, of another picture."""
    fact, other = (str(image.path), prompt), drawn_words([word], seed + 1)[0].edit.image
    asked = "What color is the background?"
    queries = {
        "reliability": Query(image, prompt, word, fact),
        "modal_generality": Query(View(image, seed), prompt, word, fact),
        "same_image": Query(image, asked, "yes", (*fact, asked)),
        "modal_locality": Query(other, prompt, "yes", (other, prompt)),
    }
    if prompt in PHRASINGS[THING]:  # of other questions no other words are known
        rephrased = [phrase for phrase in PHRASINGS[THING] if phrase != prompt][-1]
        queries["text_generality"] = Query(image, rephrased, word, fact)
    return EditSample("demo", queries)


def drawn_words(words: list[str], seed: int) -> list[EditSample]:
    """Draw pictures and questions about them; the words become the new answers."""
    samples = drawn_samples(len(words), split_scenes()[1], f"demo {seed}", held_out=True)
    changed = []
    for sample, word in zip(samples, words, strict=True):
        queries = dict(sample.queries)
        for name in ("reliability", "text_generality", "modal_generality"):
            queries[name] = replace(queries[name], target=word)
        changed.append(EditSample("demo", queries))
    return changed


def describe(picture) -> str:
    """Name a file, or say what a drawing shows."""
    if isinstance(picture, ImageFile):
        return str(picture.path)
    return f"a picture of {picture.scene.answer('caption')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", default=WORDS, help="the new answers")
    parser.add_argument("--image", type=Path, help="edit this file: words are question and answer")
    parser.add_argument("--editor", type=Path, default=ROOT / "tiny-llava" / "editor")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and questions")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "output" / "demo.png", help="the picture"
    )
    given = parser.parse_args()
    if given.image and len(given.words) != 2:
        parser.error("--image FILE takes a question and its new answer")
    set_up_process()
    model, processor = load_model("tiny-llava", "cpu", "auto")
    try:
        editor = LiveEdit.from_pretrained(model, processor, given.editor)
        asked, words = (given.words[0], given.words[1:]) if given.image else ("?", given.words)
        for word in words:
            labels = editor.encode(None, asked, word)["labels"]  # raises if it cannot be an answer
            tokens = int((labels != IGNORE).sum())
            if tokens > editor.config.rank:
                most = f"an expert of this editor writes {editor.config.rank}"
                print(f"{word!r} has {tokens} tokens with its end, {most}: it may end wrongly")
        samples = samples_of(list(given.words), given.seed)
        if given.image:
            samples = [real_sample(ImageFile(given.image), *given.words, given.seed)]
        samples[0].edit.image.open()
    except (OSError, ValueError) as error:
        sys.exit(f"demo.py: {error}")
    queries = [query for sample in samples for query in sample.queries.values()]

    def ask() -> dict:
        answers = answer(editor, queries, batch_size=64)
        return dict(zip(queries, answers, strict=True))

    before = ask()
    edits = editor.edit_many([question(sample.edit) for sample in samples])
    after, results = ask(), []
    for sample, edit in zip(samples, edits, strict=True):
        print(f"\nedit {edit.id}, {describe(sample.edit.image)}: {edit.prompt} -> {edit.target}")
        results += judge(sample, edit.id, len(edits), before, after)
        for result in results[-len(sample.queries) :]:
            if title := TITLES.get(result["query"]):
                mark = "ok   " if result["free_running"] else "WRONG"
                said = f"{result['before']} -> {result['after']}"
                print(f"  {mark} {title:<16} {result['prompt']:<42} {said}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draw_edits(samples, results, given.out, shown=len(samples))
    print(f"\n{len(editor.experts)} edits in force; pictures and answers are in {given.out}")
    held = [r["free_running"] for r in results if r["query"] == "reliability"]
    if given.words == WORDS and sum(held) < 0.8 * len(held):
        sys.exit(f"demo.py: of {len(held)} edits only {sum(held):.0f} hold")


if __name__ == "__main__":
    main()
