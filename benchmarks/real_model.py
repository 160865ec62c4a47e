"""What only a real language model can show: plain calls of one whose edits are in force.

    python run.py --model output/smol-llava --data output/emoji --out output/smol
    python benchmarks/real_model.py --run output/smol    less than ten minutes on 2 CPU cores

Asks general questions without a picture, questions about edited pictures that no training knows,
edited questions in a chat of two turns, by sampling, and of a model with int8 weights; writes
real_model.json beside the editor.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.common import read_stream
from benchmarks.emoji import QUESTIONS
from benchmarks.smol_llava import GENERAL_QUESTIONS
from data import normalise
from drawn import OTHER_QUESTIONS, PHRASINGS
from liveedit import LiveEdit
from run import load_model, set_up_process

UNTRAINED_QUESTIONS = (
    "Is this an animal?", "Could you eat this?", "Is there any text in it?",
    "What is this used for?", "Is it day or night here?",
)  # fmt: skip


def turn(role: str, text: str, pictured: bool = False) -> dict:
    """One message of a chat."""
    picture = [{"type": "image"}] if pictured else []
    return {"role": role, "content": [*picture, {"type": "text", "text": text}]}


@torch.no_grad()
def say(model, processor, chats: list, images: list | None, tokens: int, **how) -> list[str]:
    """Continue chats that all have one picture or all have none, greedily unless told otherwise."""
    said = []
    for i in range(0, len(chats), 25):
        texts = [
            processor.apply_chat_template(chat, add_generation_prompt=True)
            for chat in chats[i : i + 25]
        ]
        pictures = images[i : i + 25] if images else None
        settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        inputs = processor(images=pictures, text=texts, **settings)
        inputs = inputs.to(model.dtype)
        made = model.generate(**inputs, max_new_tokens=tokens, **({"do_sample": False} | how))
        new = made[:, inputs.input_ids.shape[1] :]
        said += processor.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in said]


def share(hits) -> float:
    """Average truths, in per cent."""
    hits = list(hits)
    return round(100 * sum(hits) / len(hits), 1)


def right(said: list[str], wanted: list[str]) -> float:
    """Tell how many answers are the wanted ones, in per cent."""
    return share(normalise(a) == normalise(b) for a, b in zip(said, wanted, strict=True))


def same(editor: LiveEdit, chats: list, images: list | None, tokens: int) -> float:
    """Tell how many answers are as without the edits, in per cent."""
    with editor.disabled():
        before = say(editor.model, editor.processor, chats, images, tokens)
    after = say(editor.model, editor.processor, chats, images, tokens)
    return share(a == b for a, b in zip(before, after, strict=True))


@torch.no_grad()
def general_logits_equal(editor: LiveEdit) -> bool:
    """Compare the logits of general questions with the unedited model's, to the bit."""
    for text in GENERAL_QUESTIONS:
        inputs = editor.encode(None, text)
        with editor.disabled():
            before = editor.model(**inputs).logits
        if not torch.equal(before, editor.model(**inputs).logits):
            return False
    return True


def measure(editor: LiveEdit, samples: list, stream_length: int) -> dict:
    """Ask everything about the given samples of the stream."""
    model, processor = editor.model, editor.processor
    edits = [sample.edit for sample in samples]
    images = [edit.image.open() for edit in edits]
    targets = [edit.target for edit in edits]
    asked = [[turn("user", edit.prompt, True)] for edit in edits]
    others = [sample.queries["same_image"] for sample in samples]
    found = {"edits": stream_length, "n": len(samples)}

    # No edit is used without a picture, so these two must come out as True and 100.
    found["general_logits_equal"] = general_logits_equal(editor)
    general = [[turn("user", text)] for text in GENERAL_QUESTIONS]
    found["general_same"] = same(editor, general, None, 40)

    asking = [*PHRASINGS.values(), *QUESTIONS.values()]
    trained = {phrase for phrases in asking for phrase in phrases}
    assert trained.union(OTHER_QUESTIONS).isdisjoint(UNTRAINED_QUESTIONS)
    for question in UNTRAINED_QUESTIONS:
        chats = [[turn("user", question, True)] for _ in samples]
        found.setdefault("untrained_same", {})[question] = same(editor, chats, images, 20)

    found["greedy"] = right(say(model, processor, asked, images, 20), targets)
    found["sampled"] = right(
        say(model, processor, asked, images, 20, do_sample=True, top_k=0), targets
    )
    # Another question first, then the edited one; and the other way round.
    first = say(model, processor, [[turn("user", q.prompt, True)] for q in others], images, 20)
    chats = [
        [turn("user", other.prompt, True), turn("assistant", said), turn("user", edit.prompt)]
        for other, said, edit in zip(others, first, edits, strict=True)
    ]
    found["second_turn"] = right(say(model, processor, chats, images, 20), targets)
    chats = [
        [*chat, turn("assistant", target), turn("user", other.prompt)]
        for chat, target, other in zip(asked, targets, others, strict=True)
    ]
    found["other_fact_after_it_same"] = same(editor, chats, images, 20)
    return found | int8(editor, asked, images, targets)


def int8(editor: LiveEdit, asked: list, images: list, targets: list[str]) -> dict:
    """Ask again with the language model's weights rounded to int8; the edits stay as they are."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        print("torchao is not installed: int8 weights are left out")
        return {}
    quantize_(editor.model.model.language_model, Int8WeightOnlyConfig())
    return {"int8": right(say(editor.model, editor.processor, asked, images, 20), targets)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("output"), help="run.py's output folder")
    parser.add_argument("--count", type=int, default=100, help="edits to ask about")
    options = parser.parse_args()
    set_up_process()
    torch.manual_seed(0)
    try:
        ran = json.loads((options.run / "metrics.json").read_text())["options"]
        stream = read_stream(ran["data"], ran["edits"], ran["seed"])
    except (OSError, ValueError) as error:
        sys.exit(f"real_model.py: {error}")
    model, processor = load_model(ran["model"], "cpu", "auto")
    editor = LiveEdit.from_pretrained(model, processor, options.run / "editor")
    in_force = [(edit.prompt, edit.target) for edit in editor.edits()]
    if in_force != [(sample.edit.prompt, sample.edit.target) for sample in stream]:
        sys.exit(f"real_model.py: the edits in {options.run / 'editor'} are not those of its run")
    samples = random.Random(0).sample(stream, min(options.count, len(stream)))
    found = measure(editor, samples, len(editor.experts))
    (options.run / "real_model.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
