"""Train editors of other ranks and layers, without a part of the method or of the world.

    python benchmarks/variants.py --parts --ranks 1 4 -- --train-steps 300 --train-samples 3000
    python benchmarks/variants.py --transfer -- --train-steps 300 --train-samples 3000
    python benchmarks/variants.py --layers 10 24 -- --model output/smol-llava --batch-size 8
    python benchmarks/variants.py --table FILE

What stands behind -- are options of run.py, alike for all. Each is trained from the start, takes
one stream of edits and is asked all its questions; what FILE has is not trained again, so that a
comparison can be continued. Writes variants.json.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import EditSample
from liveedit import LiveEdit
from run import (
    ask_all,
    judge,
    keep_freed_memory,
    longest_answer,
    parse_options,
    prepare,
    question,
    report_row,
    summarise,
    train,
)

LOSSES = ("reliability", "generality", "locality", "filter", "sigmoid", "softmax")
COLUMNS = {
    "reliability": "Rel", "text_generality": "T-Gen", "modal_generality": "M-Gen",
    "modal_locality": "M-Loc", "same_image": "Same img", "similar_image": "Similar",
}  # fmt: skip


def leave_out(editor: LiveEdit, name: str) -> None:
    """Train without one of the losses."""

    def training_losses(*batch) -> dict[str, Tensor]:
        losses = LiveEdit.training_losses(editor, *batch)
        losses["total"] = losses["total"] - losses[name]
        return losses

    editor.training_losses = training_losses


def shows_a_curve(sample: EditSample) -> bool:
    """Is a picture of the sample one of these shapes?"""
    pictured = [query.image for query in sample.queries.values() if query.image]
    return any(image.scene.shape in ("circle", "heart", "crescent", "ring") for image in pictured)


def edits_a_curve(sample: EditSample) -> bool:
    """Is the edited picture one of these shapes?"""
    return sample.edit.image.scene.shape in ("circle", "heart", "crescent", "ring")


def asks_for_a_caption(sample: EditSample) -> bool:
    """Is the edited question one for a caption?"""
    return sample.edit.fact[1] == "caption"


def has_long_target(sample: EditSample) -> bool:
    """Has the answer more than 12 characters?"""
    return len(sample.edit.target) > 12


# What --transfer leaves out of the training, and which edits of the stream show what that costs.
WORLDS = {
    "round shapes": (shows_a_curve, edits_a_curve),
    "captions": (asks_for_a_caption, asks_for_a_caption),
    "long targets": (has_long_target, has_long_target),
}


def measure(arguments: list[str], without: str | None) -> dict:
    """Train one variant and give its row of the report.

    without: one of LOSSES or WORLDS.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = parse_options([*arguments, "--out", folder])
        torch.manual_seed(options.seed)
        editor, samples, stream = prepare(options)
        if without in LOSSES:
            leave_out(editor, without)
        if without in WORLDS:
            left_out = WORLDS[without][0]
            samples = [sample for sample in samples if not left_out(sample)]
        trained = train(editor, samples, options)
    longest, batch_size = longest_answer(editor, stream), options.eval_batch_size
    before = ask_all(editor, stream, longest, batch_size)
    edits = editor.edit_many([question(sample.edit) for sample in stream], batch_size)
    after = ask_all(editor, stream, longest, batch_size)
    judged = [
        judge(sample, edit.id, len(stream), before, after)
        for sample, edit in zip(stream, edits, strict=True)
    ]
    row = report_row(len(stream), sum(judged, []))
    row["worlds"] = {}
    for name, (_, asked) in WORLDS.items():
        part = [results for sample, results in zip(stream, judged, strict=True) if asked(sample)]
        row["worlds"][name] = {"n": len(part), **summarise(sum(part, []), "free_running")}
    row |= {"seconds": trained["seconds"], "seconds_of_states": trained["seconds_hidden_states"]}
    return row | {"losses": trained["losses"][-1], "bytes": editor.experts.bytes_per_edit()}


def markdown(results: dict) -> str:
    """Print free-running figures, one row for each variant, and for each part of the world."""
    lines = ["| free-running | " + " | ".join(COLUMNS.values()) + " | loss Rel | loss Gen |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for name, row in results["variants"].items():
        cells = [f"{row['free_running'][column]:.1f}" for column in COLUMNS]
        cells += [f"{row['losses'][loss]:.2f}" for loss in ("reliability", "generality")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| edits of | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for world in WORLDS:
        for name in ("as it is", f"trained without {world}"):
            if name in results["variants"]:
                found = results["variants"][name]["worlds"][world]
                cells = " | ".join(f"{found[column]:.1f}" for column in COLUMNS)
                lines.append(f"| {world}, {name} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[])
    parser.add_argument("--layers", type=int, nargs="*", default=[])
    parser.add_argument("--parts", action="store_true", help="dot products; each loss left out")
    parser.add_argument("--transfer", action="store_true", help="parts of the world left out")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "variants.json")
    parser.add_argument("--table", type=Path, help="print the table of these results only")
    parser.add_argument("options", nargs="*", help="of run.py, behind --")
    given = parser.parse_args()
    if given.table:
        print(markdown(json.loads(given.table.read_text())))
        return
    variants = {"as it is": ([], None)}
    variants |= {f"rank {rank}": (["--rank", str(rank)], None) for rank in given.ranks}
    variants |= {f"layer {layer}": (["--layer", str(layer)], None) for layer in given.layers}
    if given.parts:
        variants["dot products, not cosines"] = (["--similarity", "dot"], None)
        variants |= {f"without the loss {name}": ([], name) for name in LOSSES}
    if given.transfer:
        variants |= {f"trained without {name}": ([], name) for name in WORLDS}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results = {"options": given.options, "versions": versions, "variants": {}}
    if given.out.exists():
        results["variants"] = json.loads(given.out.read_text())["variants"]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    for name, (more, without) in variants.items():
        if name in results["variants"]:
            continue
        began = time.time()
        results["variants"][name] = measure([*given.options, *more], without)
        given.out.write_text(json.dumps(results, indent=1))
        print(f"{name}: {time.time() - began:.0f} s", flush=True)
    print(markdown(results))


if __name__ == "__main__":
    main()
