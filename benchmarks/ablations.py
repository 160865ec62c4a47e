"""Take parts of the method away from a trained editor, and ask one stream again and again.

    python run.py                         first: the editor in output/
    python benchmarks/ablations.py --edits 250        a quarter of an hour on one thread
    python benchmarks/ablations.py --table FILE

The editor is not trained anew (see variants.py): what does each part do for the one there is? In
the last rows experts are not generated but optimised, edit by edit. Writes ablations.json.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.common import (
    COLUMNS,
    ask_before,
    edit_and_judge,
    open_results,
    options_of,
    read_stream,
    sentinel_alone,
    table,
    trained_editor,
)
from benchmarks.updates import evaluate_updates
from generator import ExpertGenerator, apply_experts, fit_norm
from liveedit import LiveEdit, States
from router import Features, Router, Routing, text_similarity
from run import answer, load_model, question, report_row
from training_pictures import training_samples

# Gives other weights (B, n) from the router, its decision, the text scores and which are used.
Weigh = Callable[[Router, Routing, Tensor, Tensor], Tensor]


def mean(router: Router, routing: Routing, scores: Tensor, used: Tensor) -> Tensor:
    """Weigh all experts that are used alike."""
    return used / used.sum(1, keepdim=True).clamp(min=1)


def top_1(router: Router, routing: Routing, scores: Tensor, used: Tensor) -> Tensor:
    """Use the expert alone that the text finds most relevant, by its sigmoid."""
    if not used.shape[1]:
        return routing.weights
    relevant = scores.masked_fill(~used, -torch.inf)
    best = relevant == relevant.amax(1, keepdim=True)
    return torch.where(used & best, scores.sigmoid(), 0.0)


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

    def route(features: Features, visual_keys: Tensor, text_keys: Tensor, *has_image) -> Routing:
        routing = Router.route(router, features, visual_keys, text_keys, *has_image)
        scores = text_similarity(features.text, text_keys[routing.experts])
        return routing._replace(weights=weigh(router, routing, scores, routing.weights > 0))

    router.route = route


def untrained_generator(editor: LiveEdit) -> None:
    """Put a new generator, as training begins with, in the place of the trained one."""
    torch.manual_seed(0)
    c, width = editor.config, editor.norm.weight.numel()
    editor.generator = ExpertGenerator(width, c.module_dim, c.rank, c.heads, c.gain)
    edits = [question(sample.edit) for sample in training_samples(32, 0)]
    states = editor.capture(edits, above=False)
    used = states.masks.image | states.masks.prompt | states.masks.answer
    fit_norm(editor.generator.norm_U, states.hidden[used].float())


def optimised_experts(editor: LiveEdit, steps: int) -> None:
    """Train each edit's own U and V on its target, from those that the generator makes."""
    generate = editor._experts_and_keys

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

    # Optimising needs what the layers above are called with.
    editor.capture = partial(captured_whole, editor)
    editor._experts_and_keys = make_experts


def captured_whole(editor: LiveEdit, questions: list, above: bool) -> States:
    """Capture what training needs, too."""
    return LiveEdit.capture(editor, questions)


def optimised_from_untrained(editor: LiveEdit, steps: int) -> None:
    """Train each edit's own U and V without any generator that has been trained."""
    untrained_generator(editor)
    optimised_experts(editor, steps)


# What is taken away: (changes of the config, a change of the editor). The margin of "newest wins"
# is measured from the threshold and uses the text: where these are changed, newest does not win.
BLEND = {"newest_wins": False}
NO_FILTER = BLEND | {"threshold": -1.0}
ABLATIONS = {
    "LiveEdit": ({}, None),
    "sentinel alone (the paper)": ({}, sentinel_alone),
    "newest does not win (the paper)": (BLEND, None),
    "fixed threshold 0.3": (BLEND | {"threshold": 0.3}, None),
    "fixed threshold 0.4": (BLEND | {"threshold": 0.4}, None),
    "fixed threshold 0.5": (BLEND | {"threshold": 0.5}, None),
    "fixed threshold 0.6": (BLEND | {"threshold": 0.6}, None),
    "fixed threshold 0.7": (BLEND | {"threshold": 0.7}, None),
    "filter, then top-1": (BLEND, partial(weighing, top_1)),
    "filter, then the mean": (BLEND, partial(weighing, mean)),
    "filter, then softmax alone": (BLEND, partial(weighing, no_sigmoid)),
    "filter, then weights by picture": (BLEND, partial(weighing, by_picture)),
    "text alone, no filter": (NO_FILTER, None),
    "text alone, top-1": (NO_FILTER, partial(weighing, top_1)),
    "picture alone, no filter": (NO_FILTER, partial(weighing, by_picture)),
    "untrained generator": ({}, untrained_generator),
    "optimised from generated, 20 steps": ({}, partial(optimised_experts, steps=20)),
    "optimised from untrained, 20 steps": ({}, partial(optimised_from_untrained, steps=20)),
    "optimised from untrained, 100 steps": ({}, partial(optimised_from_untrained, steps=100)),
}


def measure(editor: LiveEdit, stream: list, options: argparse.Namespace, before: dict) -> dict:
    """Edit the whole stream and ask all its queries; then the stream of updates."""
    judged = edit_and_judge(editor, stream, before, options.eval_batch_size)
    row = report_row(len(stream), sum(judged, []))
    return row | {"updates": evaluate_updates(editor, stream, options, answer)}


def markdown(results: dict) -> str:
    """Print free-running figures, one row for each ablation."""
    rows = {
        name: row["free_running"] | row["updates"] for name, row in results["ablations"].items()
    }
    return table("free-running", COLUMNS | {"newest": "newest, %", "old": "old, %"}, rows)


def main() -> None:
    parser = options_of(__doc__, "ablations.json")
    parser.add_argument("--data", help="a folder as run.py takes it; else the drawn world")
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-batch-size", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), help="these rows")
    given = parser.parse_args()
    if given.edits < 5:
        parser.error("--edits must be at least 5: a fifth of them are edited again")
    if given.table:
        print(markdown(json.loads(given.table.read_text())))
        return
    model, processor = load_model(given.model, "cpu", "auto")
    stream = read_stream(given.data, given.edits, given.seed)
    settings = {name: getattr(given, name) for name in ("model", "data", "edits", "seed")}
    results = {"ablations": {}} | open_results(given.out, settings)
    before = {}
    for name, (changes, change) in ABLATIONS.items():
        if name in results["ablations"] or (given.only and name not in given.only):
            continue
        editor = trained_editor(model, processor, given.editor, **changes)
        before = before or ask_before(editor, stream, given.eval_batch_size)
        if change is not None:
            change(editor)
        results["ablations"][name] = measure(editor, stream, given, before)
        editor.detach()
        given.out.write_text(json.dumps(results, indent=1))
        print(name, flush=True)
    print(markdown(results))


if __name__ == "__main__":
    main()
