"""Train editors of other ranks and layers, without a part of the method or of the world.

    python benchmarks/variants.py --parts --ranks 1 4 -- --train-steps 300 --train-samples 9600
    python benchmarks/variants.py --transfer -- --train-steps 300 --train-samples 9600
    python benchmarks/variants.py --layers 10 24 -- --model output/smol-llava --batch-size 8
    python benchmarks/variants.py --table FILE

What stands behind -- are options of run.py, alike for all; of --train-samples each variant gets
half, as --transfer drops up to that many. Each is trained from the start, takes one stream of edits
and is asked all its questions. A comparison that was interrupted is continued where it stopped.
Writes variants.json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.common import COLUMNS, ask_before, edit_and_judge, open_results, percent, table
from benchmarks.lengths import LONGEST, by_length
from data import EditSample
from drawn import PHRASINGS, Drawing
from liveedit import LiveEdit
from router import Features
from run import parse_options, prepare, report_row, set_up_process, train

LOSSES = ("reliability", "generality", "locality", "filter", "sigmoid", "softmax")
ROUND_SHAPES = ("circle", "heart", "crescent", "ring")
LONG = 12  # characters


def pictures_round_shapes(sample: EditSample) -> bool:
    """Is a drawing of the sample of a round shape? Invented pictures have forms of any kind."""
    pictured = [query.image for query in sample.queries.values()]
    drawn = [image for image in pictured if isinstance(image, Drawing)]
    return any(image.scene.shape in ROUND_SHAPES for image in drawn)


def edits_a_round_shape(sample: EditSample) -> bool:
    """Is the edited picture of a round shape?"""
    return sample.edit.image.scene.shape in ROUND_SHAPES


def asks_for_captions(sample: EditSample) -> bool:
    """Asks any of the sample's questions for a caption?"""
    return any(query.prompt in PHRASINGS["caption"] for query in sample.queries.values())


def edits_a_caption(sample: EditSample) -> bool:
    """Is the edited question one for a caption?"""
    return sample.edit.fact[1] == "caption"


def has_long_target(sample: EditSample) -> bool:
    """Is the new answer a long one?"""
    return len(sample.edit.target) > LONG


# What --transfer leaves out of the training, and which edits of the stream show what that costs.
WORLDS = {
    "round shapes": (pictures_round_shapes, edits_a_round_shape),
    "captions": (asks_for_captions, edits_a_caption),
    "long targets": (has_long_target, has_long_target),
}


class Variant(NamedTuple):
    """How a training differs from the others."""

    options: tuple[str, ...] = ()  # of run.py
    loss: str | None = None  # one of LOSSES that is left out
    world: str | None = None  # one of WORLDS that is left out
    change: Callable[[LiveEdit], None] | None = None  # of the editor, before it is trained


def leave_out(editor: LiveEdit, name: str) -> None:
    """Train without one of the losses."""

    def training_losses(*batch) -> dict[str, Tensor]:
        losses = LiveEdit.training_losses(editor, *batch)
        losses["total"] = losses["total"] - losses[name]
        return losses

    editor.training_losses = training_losses


def compare_what_is_seen(editor: LiveEdit) -> None:
    """Compare with the sentinel what a query sees in its image, as Eq. (5) of the paper does."""

    def sentinel_similarity(features: Features) -> Tensor:
        return (features.visual * features.sentinel).sum(-1).mean(-1)

    editor.router.sentinel_similarity = sentinel_similarity


def leave_out_questions(editor: LiveEdit) -> None:
    """Train without other questions: Eq. (15) takes a random edit, Eq. (16) lacks their keys."""

    def training_losses(batch, text_locality) -> dict[str, Tensor]:
        return LiveEdit.training_losses(editor, batch)

    editor.training_losses = training_losses


def measure(arguments: list[str], variant: Variant) -> dict:
    """Train one variant and give its row of the report."""
    with tempfile.TemporaryDirectory() as folder:
        options = parse_options([*arguments, *variant.options, "--out", folder])
        torch.manual_seed(options.seed)
        editor, samples, stream = prepare(options)
        count = len(samples) // 2
        if variant.loss:
            leave_out(editor, variant.loss)
        if variant.change:
            variant.change(editor)
        if variant.world:
            left_out = WORLDS[variant.world][0]
            samples = [sample for sample in samples if not left_out(sample)]
        samples = samples[:count]
        options.batch_size = min(options.batch_size, len(samples))
        options.expert_batch_size = min(options.expert_batch_size, len(samples))
        trained = train(editor, samples, options)
    batch_size = options.eval_batch_size
    before = ask_before(editor, stream, batch_size)
    judged = edit_and_judge(editor, stream, before, batch_size)
    row = report_row(len(stream), sum(judged, [])) | {"losses": trained["losses"][-1]}
    row |= {"samples": trained["samples"], "bytes": editor.experts.bytes_per_edit()}
    row |= {"rank": editor.config.rank, "layer": editor.config.layer}
    row |= {"seconds": trained["seconds"], "seconds_of_states": trained["seconds_hidden_states"]}
    row["by_length"] = {
        str(tokens): {"right": percent(scores), "n": len(scores)}
        for tokens, scores in by_length(sum(judged, []), "reliability").items()
    }
    row["worlds"] = {}
    for name, (_, asked) in WORLDS.items():
        part = [results for sample, results in zip(stream, judged, strict=True) if asked(sample)]
        row["worlds"][name] = {"n": len(part), **report_row(0, sum(part, []))["free_running"]}
    return row


def markdown(results: dict) -> str:
    """Print free-running figures, one row for each variant, and for each part of the world.

    Lengths are tokens of the target, without the end; whole answers of edits that are right.
    """
    rows, worlds, lengths = {}, {}, {}
    tokens = {str(n): str(n) for n in range(1, LONGEST)} | {str(LONGEST): f"{LONGEST} or more"}
    for name, row in results["variants"].items():
        losses = {
            f"{loss} loss": f"{row['losses'][loss]:.2f}" for loss in ("reliability", "generality")
        }
        rows[name] = row["free_running"] | losses
        found = row["by_length"]
        lengths[name] = {n: found[n]["right"] if n in found else "-" for n in tokens}
        counts = {n: str(found[n]["n"]) if n in found else "0" for n in tokens}
    for world in WORLDS:
        if f"trained without {world}" in results["variants"]:
            for name in ("as it is", f"trained without {world}"):
                worlds[f"{world}, {name}"] = results["variants"][name]["worlds"][world]
    columns = COLUMNS | {"reliability loss": "loss Rel", "generality loss": "loss Gen"}
    tables = [table("free-running", columns, rows)]
    tables.append(table("tokens of the target", tokens, lengths | {"n": counts}))
    if worlds:
        tables.append(table("edits of", COLUMNS, worlds))
    return "\n\n".join(tables)


def chosen_variants(given: argparse.Namespace) -> dict[str, Variant]:
    """Name the variants that the command line asks for; the first is the method as it is."""
    variants = {"as it is": Variant()}
    variants |= {f"rank {rank}": Variant(("--rank", str(rank))) for rank in given.ranks}
    variants |= {f"layer {layer}": Variant(("--layer", str(layer))) for layer in given.layers}
    if given.parts:
        variants["dot products, not cosines"] = Variant(("--similarity", "dot"))
        variants["sentinel as in the paper"] = Variant(change=compare_what_is_seen)
        variants["without other questions"] = Variant(change=leave_out_questions)
        variants |= {f"without the loss {name}": Variant(loss=name) for name in LOSSES}
    if given.transfer:
        variants |= {f"trained without {name}": Variant(world=name) for name in WORLDS}
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[])
    parser.add_argument("--layers", type=int, nargs="*", default=[])
    parser.add_argument("--parts", action="store_true", help="forms of the paper, losses left out")
    parser.add_argument("--transfer", action="store_true", help="parts of the world left out")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "variants.json")
    parser.add_argument("--table", type=Path, help="print the table of these results only")
    parser.add_argument("options", nargs="*", help="of run.py, behind --")
    given = parser.parse_args()
    if given.table:
        print(markdown(json.loads(given.table.read_text())))
        return
    results = {"variants": {}} | open_results(given.out, {"options": given.options})
    set_up_process()
    for name, variant in chosen_variants(given).items():
        if name not in results["variants"]:
            began = time.time()
            results["variants"][name] = measure(given.options, variant)
            given.out.write_text(json.dumps(results, indent=1))
            print(f"{name}: {time.time() - began:.0f} s", flush=True)
    print(markdown(results))


if __name__ == "__main__":
    main()
