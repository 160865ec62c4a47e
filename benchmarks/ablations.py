"""Take parts of the method away from a trained editor, and ask the main job's stream again.

    python run.py                         first: the editor in output/
    python benchmarks/ablations.py        a minute for 100 edits on 2 CPU cores
    python benchmarks/ablations.py --table FILE

Nothing is trained anew: what each part does for the trained editor. Writes ablations.json.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.updates import evaluate_updates
from data import drawn_stream, drawn_training
from generator import ExpertGenerator, apply_experts, standardise
from liveedit import LiveEdit, States
from router import Features, Router, Routing, text_similarity
from run import answer, ask_all, judge, load_model, longest_answer, question, report_row

# Gives other weights (B, n) from the router, its decision, the text scores and which are used.
Weigh = Callable[[Router, Routing, Tensor, Tensor], Tensor]


def mean(router: Router, routing: Routing, scores: Tensor, used: Tensor) -> Tensor:
    """Weigh all experts that are used alike."""
    return used / used.sum(1, keepdim=True).clamp(min=1)


def top_1(router: Router, routing: Routing, scores: Tensor, used: Tensor) -> Tensor:
    """Use the heaviest expert alone, with its weight."""
    most = routing.weights.amax(1, keepdim=True) if used.shape[1] else routing.weights
    return torch.where(used & (routing.weights == most), routing.weights, 0.0)


def by_picture(router: Router, routing: Routing, scores: Tensor, used: Tensor) -> Tensor:
    """Weigh by a softmax over the visual similarities, without the text."""
    logits = router.visual_logits(routing.similarity[:, routing.experts])
    return torch.where(used, logits.masked_fill(~used, -1e30).softmax(-1), 0.0)


def no_sigmoid(router: Router, routing: Routing, scores: Tensor, used: Tensor) -> Tensor:
    """Weigh by the softmax alone: what the filter keeps acts in full."""
    return torch.where(used, scores.masked_fill(~used, -1e30).softmax(-1), 0.0)


def weighing(weigh: Weigh, editor: LiveEdit) -> None:
    """Put other weights in the place of the soft router's."""
    router = editor.router

    def route(features: Features, visual_keys: Tensor, text_keys: Tensor) -> Routing:
        routing = Router.route(router, features, visual_keys, text_keys)
        scores = text_similarity(features.text, text_keys[routing.experts])
        return routing._replace(weights=weigh(router, routing, scores, routing.weights > 0))

    router.route = route


def untrained_generator(editor: LiveEdit) -> None:
    """Put a new generator, as training begins with, in the place of the trained one."""
    torch.manual_seed(0)
    c, width = editor.config, editor.norm.weight.numel()
    editor.generator = ExpertGenerator(width, c.module_dim, c.rank, c.heads, c.gain)
    edits = [question(sample.edit) for sample in drawn_training(32, 0)]
    states = editor.capture(edits, above=False)
    used = states.masks.image | states.masks.prompt | states.masks.answer
    standardise(editor.generator.norm_U, states.hidden[used].float())


def optimised_experts(editor: LiveEdit, steps: int) -> None:
    """Train each edit's own U and V on its target, from those of an untrained generator."""
    untrained_generator(editor)
    generate = editor._make_experts

    def make_experts(states: States) -> dict[str, Tensor]:
        experts, own = generate(states), torch.eye(len(states.hidden))
        U, V = (experts[name].requires_grad_() for name in ("U", "V"))
        optimizer = torch.optim.Adam([U, V], lr=0.01)
        normed, targets = editor.norm(states.hidden), states.labels[states.masks.answer]
        for _ in range(steps):
            edited = states.hidden + apply_experts(normed.detach(), U, V, own)
            logits = editor.frozen.upper(edited, states)
            optimizer.zero_grad()
            F.cross_entropy(logits, targets, reduction="sum").backward()
            optimizer.step()
        return experts | {"U": U.detach(), "V": V.detach()}

    # Training needs what the layers above are called with.
    editor.capture = partial(captured_whole, editor)
    editor._make_experts = make_experts


def captured_whole(editor: LiveEdit, questions: list, above: bool) -> States:
    """Capture what training needs, too."""
    return LiveEdit.capture(editor, questions)


# What is taken away: (changes of the config, a change of the editor). The margin of "newest wins"
# is measured from the threshold: where that is another, newest does not win.
BLEND = {"newest_wins": False}
ABLATIONS = {
    "LiveEdit": ({}, None),
    "newest does not win (the paper)": (BLEND, None),
    "... and no visual filter": (BLEND | {"threshold": -1.0}, None),
    "... and a fixed threshold, 0.5": (BLEND | {"threshold": 0.5}, None),
    "... and a fixed threshold, 0.7": (BLEND | {"threshold": 0.7}, None),
    "... and a fixed threshold, 0.9": (BLEND | {"threshold": 0.9}, None),
    "top-1 expert": ({}, partial(weighing, top_1)),
    "mean of the kept, no sigmoid": ({}, partial(weighing, mean)),
    "softmax without sigmoid": ({}, partial(weighing, no_sigmoid)),
    "weights by picture, no sigmoid": ({}, partial(weighing, by_picture)),
    "untrained generator": ({}, untrained_generator),
    "experts optimised, 20 steps": ({}, partial(optimised_experts, steps=20)),
    "experts optimised, 100 steps": ({}, partial(optimised_experts, steps=100)),
}
COLUMNS = {
    "reliability": "Rel", "text_generality": "T-Gen", "modal_generality": "M-Gen",
    "modal_locality": "M-Loc", "same_image": "Same img", "similar_image": "Similar",
}  # fmt: skip


def measure(editor: LiveEdit, stream: list, options: argparse.Namespace, before: dict) -> dict:
    """Edit the whole stream and ask all its queries; then the stream of updates."""
    longest, batch_size = longest_answer(editor, stream), options.eval_batch_size
    edits = editor.edit_many([question(sample.edit) for sample in stream], batch_size)
    after = ask_all(editor, stream, longest, batch_size)
    results = []
    for sample, edit in zip(stream, edits, strict=True):
        results += judge(sample, edit.id, len(stream), before, after)
    row = report_row(len(stream), results)
    return row | {"updates": evaluate_updates(editor, stream, options, answer)}


def markdown(results: dict) -> str:
    """Print free-running figures, one row for each ablation."""
    lines = ["| free-running | " + " | ".join(COLUMNS.values()) + " | newest, % | old, % |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for name, row in results["ablations"].items():
        cells = [row["free_running"][column] for column in COLUMNS]
        cells += [row["updates"]["newest"], row["updates"]["old"]]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--editor", type=Path, default=ROOT / "output" / "editor")
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-batch-size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "ablations.json")
    parser.add_argument("--table", type=Path, help="print the table of these results only")
    given = parser.parse_args()
    if given.edits < 5:
        parser.error("--edits must be at least 5: a fifth of them are edited again")
    if given.table:
        print(markdown(json.loads(given.table.read_text())))
        return
    model, processor = load_model(given.model, "cpu", "auto")
    stream = drawn_stream(given.edits, given.seed)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results = {"model": given.model, "edits": given.edits, "seed": given.seed}
    results |= {"versions": versions, "ablations": {}}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    before = {}
    for name, (changes, change) in ABLATIONS.items():
        try:
            editor = LiveEdit.from_pretrained(model, processor, given.editor, **changes)
        except (OSError, ValueError) as error:
            sys.exit(f"ablations.py: {error}")
        editor.reset()
        longest = longest_answer(editor, stream)
        before = before or ask_all(editor, stream, longest, given.eval_batch_size)
        if change is not None:
            change(editor)
        results["ablations"][name] = measure(editor, stream, given, before)
        editor.detach()
        given.out.write_text(json.dumps(results, indent=1))
        print(name, flush=True)
    print(markdown(results))


if __name__ == "__main__":
    main()
