"""What LiveEdit costs on a model, as ratios that are measured in one run.

    python benchmarks/speed.py                                              tiny-llava
    python benchmarks/speed.py --model output/smol-llava --editor output/editor
    python benchmarks/speed.py --table FILE              the table of these results, or full_size's

Prints an edit as a multiple of its pass through the lower layers; prefill and each further token
as multiples of the unedited model's, after some numbers of edits; and how many samples a second
the training takes, against the straightforward way: one sequence at a time, the lower layers anew
for each loss. The edits are synthetic but for one, which the question uses.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.common import table, versions
from benchmarks.store import grow, milliseconds, seconds
from data import LOCALITY_QUERIES
from generator import apply_experts
from liveedit import LiveEdit, Question
from run import (
    ROLES,
    TrainingSet,
    load_model,
    parse_options,
    question,
    set_up_process,
    training_defaults,
)
from training_pictures import training_samples

TOKENS = 20


def cost_of_an_edit(editor: LiveEdit, asked: Question) -> dict:
    """Compare making an edit with the pass of its tokens through the lower layers."""
    inputs = editor.encode([asked.image], [asked.prompt], [asked.target])

    def edit():
        editor.edit_inputs(inputs, [asked])
        editor.reset()

    whole, lower = milliseconds(edit, lambda: editor.capture_inputs(inputs, above=False))
    return {"ms": whole, "ms_lower_layers": lower, "ratio": whole / lower}


def fill(editor: LiveEdit, asked: Question, edits: int) -> dict:
    """Make so many edits, all unrelated but the last, and give inputs that ask about it."""
    editor.reset()
    if edits:
        unrelated = torch.randn(1, *editor.experts.shapes["visual_keys"])
        grow(editor, edits - 1, F.normalize(unrelated, dim=-1))
        editor.edit(*asked)
    inputs = editor.encode(asked.image, asked.prompt)
    assert len(editor.explain(inputs)[0]) == min(1, edits)
    return inputs


@torch.no_grad()
def cost_of_a_question(model, bare, inputs: dict) -> dict:
    """Compare prefill and further tokens with those of the bare model, which has no editor."""

    def generate(model, tokens: int):
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        model.generate(**inputs, **length, do_sample=False)

    filled, before = milliseconds(
        partial(model, **inputs, logits_to_keep=1), partial(bare, **inputs, logits_to_keep=1)
    )
    first, all_, first_before, all_before = milliseconds(
        partial(generate, model, 1),
        partial(generate, model, 1 + TOKENS),
        partial(generate, bare, 1),
        partial(generate, bare, 1 + TOKENS),
    )
    return {
        "prefill": filled / before,
        "token": (all_ - first) / (all_before - first_before),
        "ms_prefill_unedited": before,
        "ms_token_unedited": (all_before - first_before) / TOKENS,
    }


def straightforward_step(editor: LiveEdit, samples: list) -> None:
    """Compute the editing losses one sequence at a time, with whole passes for each."""
    for sample in samples:
        edit = editor.capture([question(sample.edit)])
        answer = edit.masks.answer
        used = edit.masks.image | edit.masks.prompt | answer
        embedded = editor.model.get_input_embeddings()(edit.labels[answer]).float()
        for name in [name for role in ROLES for name in role if name in sample.queries]:
            U, V = editor.generator(edit.hidden.float(), used, answer, embedded)
            row = editor.capture([question(sample.queries[name])])
            hidden = row.hidden.float()
            edited = hidden + apply_experts(editor.norm(hidden), U, V, hidden.new_ones(1, 1))
            logits = editor.frozen.upper(edited.to(row.hidden.dtype), row)
            if name not in LOCALITY_QUERIES:
                loss = F.cross_entropy(logits, row.labels[row.masks.answer])
            else:
                with torch.no_grad():
                    base = editor.frozen.upper(row.hidden, row).log_softmax(-1)
                said = logits.log_softmax(-1)
                loss = F.kl_div(said, base, log_target=True, reduction="batchmean")
            loss.backward()


def training_speed(editor: LiveEdit, batch_size: int, steps: int = 5) -> dict:
    """Compare samples per second, lower layers included; ours computes the routing losses too."""
    editor.reset()
    samples, options = (
        training_samples(batch_size * steps, 0),
        parse_options(["--out", "output/speed"]),
    )
    options.batch_size = options.expert_batch_size = batch_size
    few = samples[: max(4, batch_size // 4)]

    def train_batched():
        training_set = TrainingSet(editor, samples, options)
        for step in range(steps):
            editor.training_losses(*training_set.batch(step))["total"].backward()

    straightforward_step(editor, few)  # warm
    ours = batch_size * steps / statistics.median(seconds(train_batched) for _ in range(3))
    plain = partial(straightforward_step, editor, few)
    theirs = len(few) / statistics.median(seconds(plain) for _ in range(3))
    return {"samples_per_second": ours, "straightforward": theirs, "ratio": ours / theirs}


def markdown(found: dict) -> str:
    """Print what a question costs, one row for each number of edits."""
    columns = {"prefill": "prefill", "token": "a token"}
    columns |= {"ms_prefill_unedited": "unedited: prefill, ms", "ms_token_unedited": "a token, ms"}
    rows = {}
    for row in found["question"]:
        rows[f"{row['edits']:,} edits"] = {key: f"{row[key]:.2f}" for key in columns}
    return table(found["device"], columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--editor", type=Path, default=ROOT / "tiny-llava" / "editor")
    parser.add_argument("--edits", type=int, nargs="+", default=[0, 1, 100, 500, 10_000, 100_000])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "speed.json")
    parser.add_argument("--table", type=Path, help="print the table of these results only")
    given = parser.parse_args()
    if given.table:
        print(markdown(json.loads(given.table.read_text())))
        return
    set_up_process()
    torch.manual_seed(0)
    model, processor = load_model(given.model, given.device, "auto")
    bare, _ = load_model(given.model, given.device, "auto")
    editor = LiveEdit.from_pretrained(model, processor, given.editor)
    sample = training_samples(2, 0)[0]
    found = {"model": given.model, "device": f"{torch.get_num_threads()} CPU threads"}
    if model.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name()
    found["versions"] = versions()
    asked = question(sample.edit)
    found["edit"] = cost_of_an_edit(editor, asked)
    print(found["edit"])
    found["question"] = []
    for count in given.edits:
        cost = cost_of_a_question(model, bare, fill(editor, asked, count))
        found["question"].append({"edits": count} | cost)
        print(found["question"][-1], flush=True)
    batch_size = training_defaults(editor.norm.weight.numel())["expert_batch_size"]
    found["training"] = training_speed(editor, batch_size)
    print(found["training"])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1))
    print(markdown(found))


if __name__ == "__main__":
    main()
