"""Draw figures of the results of peers.py, variants.py and full_size.py (or speed.py).

    pip install matplotlib
    python benchmarks/curves.py benchmarks/results/tiny-llava/peers.json assets
    python benchmarks/curves.py benchmarks/results/tiny-llava/variants.json assets
    python benchmarks/curves.py benchmarks/results/h100/full_size.json assets

Of peers: retention.png (edited answers, and all others, after more and more edits) and tradeoff.png
(generality against hard locality after all of them). Of variants: lengths.png (whole answers right
by length of the target, for each rank). Of full_size: cost.png (prefill and a token, as multiples
of the bare model's). Answers are free-running.
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EDITED = ("reliability", "text_generality", "modal_generality")
UNTOUCHED = ("modal_locality", "same_image", "similar_image")
GENERALITY = ("text_generality", "modal_generality")
HARD_LOCALITY = ("same_image", "similar_image")
MARKERS = "osD^v<>Pph"


def mean(row: dict, names: tuple[str, ...]) -> float:
    """Average some free-running figures of one row."""
    return statistics.mean(row["free_running"][name] for name in names)


def edits_of(method: dict) -> list[int]:
    """List after how many edits a method was asked."""
    return [row["edits"] for row in next(iter(method["seeds"].values()))]


def mean_of_seeds(method: dict, row: int, names: tuple[str, ...]) -> float:
    """Average over the seeds too."""
    return statistics.mean(mean(rows[row], names) for rows in method["seeds"].values())


def style(name: str, number: int) -> dict:
    """Give a method the same look in all figures; LiveEdit stands out."""
    strong = name == "LiveEdit"
    look = {"label": name, "marker": MARKERS[number % len(MARKERS)], "zorder": 3 if strong else 2}
    return look | {
        "color": "black" if strong else f"C{number}",
        "linewidth": 2.5 if strong else 1.2,
    }


def retention(methods: dict, file: Path) -> None:
    """Draw what is left of edits, and of the rest, as edits become more."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    titles = ("edited: mean of Rel, T-Gen, M-Gen", "not edited: mean of M-Loc, Same img, Similar")
    asked = {name: edits_of(method) for name, method in methods.items()}
    ticks = sorted({count for counts in asked.values() for count in counts})
    for panel, names, title in zip(panels, (EDITED, UNTOUCHED), titles, strict=True):
        for number, (name, method) in enumerate(methods.items()):
            values = [mean_of_seeds(method, row, names) for row in range(len(asked[name]))]
            panel.plot(asked[name], values, **style(name, number))
        panel.set(xscale="log", xlabel="edits in the model", title=title, ylim=(-3, 103))
        panel.set_xticks(ticks, [str(count) for count in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("right or unchanged, %")
    panels[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def tradeoff(methods: dict, file: Path) -> None:
    """Draw generality against hard locality after the longest stream of each method."""
    figure, panel = plt.subplots(figsize=(6, 5))
    most = max(edits_of(method)[-1] for method in methods.values())
    for number, (name, method) in enumerate(methods.items()):
        look, edits = style(name, number), edits_of(method)[-1]
        label = name if edits == most else f"{name}, {edits} edits"
        x, y = (mean_of_seeds(method, -1, names) for names in (HARD_LOCALITY, GENERALITY))
        panel.scatter(x, y, s=70, color=look["color"], marker=look["marker"], label=label)
    panel.set(xlabel="hard locality: mean of Same img and Similar, %", xlim=(-3, 103))
    panel.set(ylabel="generality: mean of T-Gen and M-Gen, %", ylim=(-3, 103))
    panel.grid(alpha=0.3)
    panel.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def lengths(variants: dict, file: Path) -> None:
    """Draw whole answers right by tokens of the target, one curve for each rank."""
    figure, panel = plt.subplots(figsize=(6, 4))
    ranks = {}
    for name, row in variants.items():
        if name == "as it is" or name.startswith("rank "):
            ranks[row["rank"]] = row["by_length"]
    for number, rank in enumerate(sorted(ranks)):
        tokens = sorted(ranks[rank], key=int)
        values = [ranks[rank][n]["right"] for n in tokens]
        panel.plot(tokens, values, marker=MARKERS[number], label=f"rank {rank}")
    panel.set(xlabel="tokens of the target (the last: or more)", ylabel="whole answers right, %")
    panel.set(ylim=(-3, 103), title="edits with open targets and made-up names")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def costs(results: dict, file: Path) -> None:
    """Draw what a question costs as edits become more."""
    questions = results["question"]
    figure, panel = plt.subplots(figsize=(6, 4))
    counts = [row["edits"] for row in questions]
    for number, (key, label) in enumerate({"prefill": "prefill", "token": "a token"}.items()):
        values = [row[key] for row in questions]
        panel.plot(counts, values, marker=MARKERS[number], label=label)
    panel.set_xscale("symlog", linthresh=1)
    panel.set_xticks(counts, [f"{count:,}" for count in counts])
    panel.minorticks_off()
    panel.set(xlabel="edits in the model", ylabel="time, as a multiple of the bare model's")
    panel.set_ylim(bottom=0)
    panel.set_title(f"{results['model']}, {results['device']}")
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right")
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if not Path(sys.argv[1]).is_file():
        sys.exit(f"curves.py: there are no results in {sys.argv[1]}")
    results = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    if "question" in results:
        costs(results, folder / "cost.png")
    elif "variants" in results:
        lengths(results["variants"], folder / "lengths.png")
    else:
        retention(results["methods"], folder / "retention.png")
        tradeoff(results["methods"], folder / "tradeoff.png")


if __name__ == "__main__":
    main()
