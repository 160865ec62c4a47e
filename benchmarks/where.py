"""Find where another picture of an edited thing is lost: eyes, projector, layers, filter, router.

    python benchmarks/where.py --model output/smol-llava --data output/emoji --editor output/editor

Each edit of the stream is asked again with its second picture. Up to the edit layer the table tells
how often that picture is nearest to the edit's own, by the mean of what a stage holds of pictures,
and by the last state of the prompt: what can be found without any editor. Then how often the own
edit is the most similar one by the filter's features, whether the filter keeps it (in the edit's
words and in others), and whether it is used. Then what another threshold would keep, of these and
of pictures that no edit concerns; and what a lookup at each stage would keep by one threshold for
all, at which as many of those keep an edit as by the filter. For models that have a
`multi_modal_projector`. Writes where.json.
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
OTHERS = ("modal_locality", "similar_image")  # the latter in the words of the edit
KEPT = {"own": "own edit kept, %", "any": "other picture keeps an edit, %"}


@torch.no_grad()
def stages(editor: LiveEdit, queries: list[Query]) -> dict[str, Tensor]:
    """Average what eyes, projector and some layers up to the edit layer hold of each picture.

    And give the last state of each prompt, which says the answer: peers.py's lookup may take it.
    """
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
        held["last state of the prompt"] = states[-1][:, -1].float()
        parts.append(held)
    hook.remove()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def cosines(edited: Tensor, seen: Tensor) -> Tensor:
    """Compare seen rows (n, D) with edited ones (N, D), standardised as these: (n, N)."""
    edited, seen = (F.normalize((x - edited.mean(0)) / edited.std(0)) for x in (edited, seen))
    return seen @ edited.T


def own_is_nearest(similarity: Tensor) -> list[bool]:
    """Tell of each row of similarity (n, n) whether the edit of the same row is the nearest."""
    return (similarity.argmax(1) == torch.arange(len(similarity))).tolist()


def shares(hits: list[bool], kinds: list[str]) -> dict[str, float]:
    """Tell how many are hits, in per cent: of all, and of each kind."""
    row = {"all": percent(hits)}
    for kind in sorted(set(kinds)):
        row[kind] = percent(hit for hit, its in zip(hits, kinds, strict=True) if its == kind)
    return row


@torch.no_grad()
def filtered(editor: LiveEdit, queries: list[Query]) -> tuple[Tensor, Tensor]:
    """Give similarities with each edit, (n, N), and how far they are above their thresholds."""
    keys, similar, above = editor.experts.rows("visual_keys"), [], []
    for i in range(0, len(queries), BATCH):
        asked = [question(query) for query in queries[i : i + BATCH]]
        states = editor.capture(asked, above=False)
        hidden, masks = states.hidden.float(), states.masks
        features = editor.router.features(Rows(hidden, masks.prompt), Rows(hidden, masks.image))
        similarity = editor.router.visual_similarity(features.visual, keys)
        threshold = editor.router.hard_filter(similarity, features)[0]
        similar.append(similarity)
        above.append(similarity - threshold[:, None])
    return torch.cat(similar), torch.cat(above)


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


def measure(editor: LiveEdit, stream: list[EditSample]) -> dict:
    """Ask about each edit's second picture, and one that no edit concerns, at every stage."""
    edits = [sample.edit for sample in stream]
    seconds = [sample.queries["modal_generality"] for sample in stream]
    asked = [query for sample in stream for query in sample.queries.items()]
    others = [query for name, query in asked if name in OTHERS]
    kinds = [kind_of(sample) for sample in stream]
    edited, seen, other = (stages(editor, queries) for queries in (edits, seconds, others))
    near = {name: cosines(edited[name], seen[name]) for name in edited}
    other_near = {name: cosines(edited[name], other[name]) for name in edited}
    found = {name: own_is_nearest(similarity) for name, similarity in near.items()}
    editor.edit_many([question(query) for query in edits], BATCH)
    similarity, above = filtered(editor, seconds)
    other_similarity, other_above = filtered(editor, others)
    found["most similar"] = own_is_nearest(above)
    found["kept by the filter"] = (above.diagonal() > 0).tolist()
    found["used"] = uses_own(editor, seconds)
    # The same words as the edit's are a hint; without it:
    phrases = [sample.queries["text_generality"].prompt for sample in stream]
    pairs = zip(seconds, phrases, strict=True)
    rephrased = filtered(editor, [replace(query, prompt=phrase) for query, phrase in pairs])[1]
    found["most similar, in other words"] = own_is_nearest(rephrased)
    found["kept, in other words"] = (rephrased.diagonal() > 0).tolist()
    results = {"edits": len(stream), "of a kind": {}, "threshold": {}, "equal locality": {}}
    for kind in sorted(set(kinds)):
        results["of a kind"][kind] = kinds.count(kind)
    results["stages"] = {name: shares(hits, kinds) for name, hits in found.items()}
    for shift in SHIFTS:
        kept = (above.diagonal() > shift).tolist(), (other_above.amax(1) > shift).tolist()
        results["threshold"][f"{shift:+.2f}"] = dict(zip(KEPT, map(percent, kept), strict=True))
    near["filter, one threshold"] = similarity
    other_near["filter, one threshold"] = other_similarity
    untouched = (other_above.amax(1) <= 0).float().mean()
    for name, own in near.items():
        threshold = other_near[name].amax(1).quantile(untouched).item()
        row = shares((own.diagonal() > threshold).tolist(), kinds)
        results["equal locality"][f"{name} ({threshold:.2f})"] = row
    results["equal locality"]["filter, as it is"] = results["stages"]["kept by the filter"]
    return results


def main() -> None:
    parser = options_of(__doc__, "where.json")
    parser.add_argument(
        "--data", help="a folder, or a file of edits, as benchmarks/emoji.py writes it"
    )
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
    results = measure(editor, stream)
    given.out.write_text(json.dumps(results, indent=1))
    print(markdown(results))


def markdown(results: dict) -> str:
    """Print a row for each stage and threshold, mostly a column for each kind of picture."""
    columns = {"all": f"all ({results['edits']})"}
    columns |= {kind: f"{kind} ({count})" for kind, count in results["of a kind"].items()}
    found = table("own edit found, %", columns, results["stages"])
    equal = table("kept, as local as the filter, %", columns, results["equal locality"])
    return "\n\n".join([found, table("threshold moved by", KEPT, results["threshold"]), equal])


if __name__ == "__main__":
    main()
