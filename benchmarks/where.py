"""Find where another picture of an edited thing is lost: eyes, projector, layers, filter, router.

    python benchmarks/where.py --model output/smol-llava --data output/emoji --editor output/editor

Each edit of the stream is asked again with its second picture. Up to the edit layer the table tells
how often that picture is nearest to the edit's own, by the mean of what a stage holds of pictures:
what can be found there without any editor. Then how often the own edit is the most similar one by
the filter's features, whether the filter keeps it (in the edit's words and in others), and whether
it is used; and what another threshold would keep, of these and of pictures that no edit concerns.
For models that have a `multi_modal_projector`. Writes where.json.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.common import options_of, percent, read_stream, table, trained_editor
from benchmarks.emoji import UNSEEN_ARTIST, has
from benchmarks.peers import pooled
from data import EditSample, Query
from liveedit import LiveEdit
from router import Rows
from run import load_model, positive, question

BATCH = 32
SHIFTS = (-0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1)  # of each query's threshold
KEPT = {"own": "own edit kept", "any": "other picture keeps an edit"}


@torch.no_grad()
def stages(editor: LiveEdit, queries: list[Query]) -> dict[str, Tensor]:
    """Average what eyes, projector and some layers up to the edit layer hold of each picture."""
    model, noted, parts = editor.model, [], []
    last = editor.config.layer
    layers = sorted({0, last // 4, last // 2, 3 * last // 4, last})
    projector = model.model.multi_modal_projector
    hook = projector.register_forward_hook(lambda module, args, out: noted.append((args[0], out)))
    for i in range(0, len(queries), BATCH):
        asked = [question(query) for query in queries[i : i + BATCH]]
        inputs = editor.encode([q.image for q in asked], [q.prompt for q in asked])
        states = model(**inputs, output_hidden_states=True).hidden_states
        image = inputs["input_ids"] == model.config.image_token_id
        eyes, projected = noted.pop()
        held = {"eyes": eyes.float().mean(1), "projector": projected.float().mean(1)}
        for layer in layers:
            held[f"behind layer {layer}"] = pooled(states[layer + 1].float(), image)
        parts.append(held)
    hook.remove()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def nearest(edited: Tensor, seen: Tensor) -> list[bool]:
    """Tell of each seen row (n, D) whether its own edited row (n, D) is the nearest."""
    edited, seen = (F.normalize((x - edited.mean(0)) / edited.std(0)) for x in (edited, seen))
    return ((seen @ edited.T).argmax(1) == torch.arange(len(seen))).tolist()


@torch.no_grad()
def margins(editor: LiveEdit, queries: list[Query]) -> Tensor:
    """Tell how far above its threshold each query's similarity with each edit is, (n, N)."""
    keys, above = editor.experts.rows("visual_keys"), []
    for i in range(0, len(queries), BATCH):
        asked = [question(query) for query in queries[i : i + BATCH]]
        states = editor.capture(asked, above=False)
        hidden, masks = states.hidden.float(), states.masks
        features = editor.router.features(Rows(hidden, masks.prompt), Rows(hidden, masks.image))
        similarity = editor.router.visual_similarity(features.visual, keys)
        threshold = editor.router.hard_filter(similarity, features)[0]
        above.append(similarity - threshold[:, None])
    return torch.cat(above)


@torch.no_grad()
def uses_own(editor: LiveEdit, queries: list[Query]) -> list[bool]:
    """Tell of each query whether it uses the edit of the same row."""
    used = []
    for i in range(0, len(queries), BATCH):
        asked = [question(query) for query in queries[i : i + BATCH]]
        inputs = editor.encode([q.image for q in asked], [q.prompt for q in asked])
        used += [[edit["id"] for edit in row] for row in editor.explain(inputs)]
    pairs = zip(editor.edits(), used, strict=True)
    return [edit.id in ids for edit, ids in pairs]


def kind_of(sample: EditSample) -> str:
    """Tell what the second picture of an edit is."""
    second = sample.queries["modal_generality"].image.path
    if has(second, "views"):
        return "view"
    unseen = has(second, UNSEEN_ARTIST) or has(sample.edit.image.path, UNSEEN_ARTIST)
    return "unknown artist" if unseen else "other artist"


def main() -> None:
    parser = options_of(__doc__, "where.json")
    parser.add_argument("--data", help="a folder as benchmarks/emoji.py writes it")
    parser.add_argument("--edits", type=positive, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the stream")
    given = parser.parse_args()
    if given.table:
        print(markdown(json.loads(given.table.read_text())))
        return
    if given.data is None:
        parser.error("--data names a folder as benchmarks/emoji.py writes it")
    try:
        stream, distinct = read_stream(given.data, given.edits, given.seed), {}
    except (OSError, ValueError) as error:
        sys.exit(f"where.py: {error}")
    for sample in stream:  # one edit of each picture: those of one picture are equally near
        distinct.setdefault(sample.edit.image, sample)
    stream = list(distinct.values())
    if len(stream) < 2:
        sys.exit(f"where.py: {given.data} and --edits {given.edits} give fewer than two pictures")
    editor = trained_editor(*load_model(given.model, "cpu", "auto"), given.editor)
    if not hasattr(editor.model.model, "multi_modal_projector"):
        sys.exit(f"where.py: {given.model} has no multi_modal_projector to look behind")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    edits = [sample.edit for sample in stream]
    seconds = [sample.queries["modal_generality"] for sample in stream]
    edited, seen = stages(editor, edits), stages(editor, seconds)
    found = {name: nearest(edited[name], seen[name]) for name in edited}
    editor.edit_many([question(query) for query in edits], BATCH)
    above = margins(editor, seconds)
    own = torch.arange(len(stream))
    found["most similar"] = (above.argmax(1) == own).tolist()
    found["kept by the filter"] = (above.diagonal() > 0).tolist()
    found["used"] = uses_own(editor, seconds)
    # The same words as the edit's are a hint; without it:
    phrases = [sample.queries["text_generality"].prompt for sample in stream]
    pairs = zip(seconds, phrases, strict=True)
    rephrased = margins(editor, [replace(query, prompt=phrase) for query, phrase in pairs])
    found["most similar, in other words"] = (rephrased.argmax(1) == own).tolist()
    found["kept, in other words"] = (rephrased.diagonal() > 0).tolist()
    others = margins(editor, [sample.queries["modal_locality"] for sample in stream])
    kinds = [kind_of(sample) for sample in stream]
    results = {"edits": len(stream), "of a kind": {}, "stages": {}, "threshold": {}}
    for kind in sorted(set(kinds)):
        results["of a kind"][kind] = kinds.count(kind)
    for name, hits in found.items():
        row = {"all": percent(hits)}
        for kind in results["of a kind"]:
            row[kind] = percent(h for h, k in zip(hits, kinds, strict=True) if k == kind)
        results["stages"][name] = row
    for shift in SHIFTS:
        kept = (above.diagonal() > shift).tolist(), (others.amax(1) > shift).tolist()
        results["threshold"][f"{shift:+.2f}"] = dict(zip(KEPT, map(percent, kept), strict=True))
    given.out.write_text(json.dumps(results, indent=1))
    print(markdown(results))


def markdown(results: dict) -> str:
    """Print a row for each stage and each threshold, a column for each kind of second picture."""
    columns = {"all": f"all ({results['edits']})"}
    columns |= {kind: f"{kind} ({count})" for kind, count in results["of a kind"].items()}
    found = table("own edit found, %", columns, results["stages"])
    return found + "\n\n" + table("threshold, %", KEPT, results["threshold"])


if __name__ == "__main__":
    main()
