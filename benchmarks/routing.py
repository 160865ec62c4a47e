"""Draw which experts the queries of a stream use: `python benchmarks/routing.py --editor FOLDER`.

    pip install matplotlib
    python benchmarks/routing.py --editor tiny-llava/editor --edits 50 --out assets/routing.png

Each panel has one row for each query of a kind and one column for each expert, in the order of
editing; the darker, the heavier. Rephrasings and other pictures should use their own edit alone
(the diagonal), all other queries none.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.common import trained_editor
from data import Query
from drawn import drawn_stream
from liveedit import LiveEdit
from run import load_model, question

PANELS = {
    "text_generality": "rephrased", "modal_generality": "another picture",
    "same_image": "another question", "similar_image": "a similar scene",
    "modal_locality": "another scene",
}  # fmt: skip


@torch.no_grad()
def weights(editor: LiveEdit, queries: list[Query]) -> torch.Tensor:
    """Give the weights of all experts for each query, (queries, edits)."""
    columns = {edit.id: column for column, edit in enumerate(editor.edits())}
    found = torch.zeros(len(queries), len(columns))
    images, prompts, _ = map(list, zip(*map(question, queries), strict=True))
    for row, used in enumerate(editor.explain(editor.encode(images, prompts))):
        for edit in used:
            found[row, columns[edit["id"]]] = edit["weight"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--editor", type=Path, default=ROOT / "output" / "editor")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "routing.png")
    given = parser.parse_args()
    editor = trained_editor(*load_model(given.model, "cpu", "auto"), given.editor)
    stream = drawn_stream(given.edits, given.seed)
    editor.edit_many([question(sample.edit) for sample in stream])
    figure, panels = plt.subplots(1, len(PANELS), figsize=(15, 3.6), layout="constrained")
    for panel, (name, title) in zip(panels, PANELS.items(), strict=True):
        found = weights(editor, [sample.queries[name] for sample in stream])
        image = panel.imshow(found, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        panel.set(title=title, xlabel="expert")
    panels[0].set_ylabel("query about edit")
    figure.colorbar(image, ax=panels, label="weight", shrink=0.8)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=100)


if __name__ == "__main__":
    main()
