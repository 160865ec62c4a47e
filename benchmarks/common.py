"""What benchmarks share: options, a trained editor, questions of a stream, results and tables."""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import EditSample, benchmark_files, read_records
from drawn import drawn_stream
from liveedit import LiveEdit
from router import Features
from run import ask_all, judge, question

COLUMNS = {
    "reliability": "Rel", "text_generality": "T-Gen", "modal_generality": "M-Gen",
    "modal_locality": "M-Loc", "same_image": "Same img", "similar_image": "Similar",
}  # fmt: skip


def options_of(description: str, results: str) -> argparse.ArgumentParser:
    """Make a parser with the options that most benchmarks have.

    description: the script's docstring; results: name of its file in output/.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--editor", type=Path, default=ROOT / "output" / "editor")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / results)
    parser.add_argument("--table", type=Path, help="print the table of these results only")
    return parser


def trained_editor(model, processor, folder: Path, **changes) -> LiveEdit:
    """Load an editor without its edits; where it does not load, one sentence ends the program."""
    try:
        editor = LiveEdit.from_pretrained(model, processor, folder, **changes)
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    editor.reset()
    return editor


def sentinel_alone(editor: LiveEdit) -> None:
    """Let the filter compare each expert with the sentinel alone, as the paper does (Eq. 5)."""
    router = editor.router

    def hard_filter(similarity: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        threshold = router.thresholds(features)
        return threshold, similarity > threshold[:, None]

    router.hard_filter = hard_filter


def read_stream(benchmark: str | None, edits: int, seed: int) -> list[EditSample]:
    """Give a stream of edits: of the drawn world, or of a benchmark as run.py reads it."""
    if benchmark is None:
        return drawn_stream(edits, seed)
    _, file, images = benchmark_files(benchmark)
    records = read_records(file, images)
    return random.Random(seed).sample(records, min(edits, len(records)))


def ask_before(editor: LiveEdit, stream: list[EditSample], batch_size: int) -> dict:
    """Answer all queries of a stream without edits, by query."""
    with editor.disabled():
        return ask_all(editor, stream, batch_size)


def edit_and_judge(
    editor: LiveEdit, stream: list[EditSample], before: dict, batch_size: int
) -> list[list[dict]]:
    """Make all edits of a stream and judge all its queries, sample by sample."""
    edits = editor.edit_many([question(sample.edit) for sample in stream], batch_size)
    after = ask_all(editor, stream, batch_size)
    return [
        judge(sample, edit.id, len(stream), before, after)
        for sample, edit in zip(stream, edits, strict=True)
    ]


def percent(values) -> float | None:
    """Average shares, in per cent."""
    values = list(values)
    return 100 * sum(values) / len(values) if values else None


def open_results(file: Path, settings: dict) -> dict:
    """Continue the results in a file, or begin new ones, of runs with these settings.

    Results of other settings or versions are not mixed: one sentence ends the program.
    """
    settings = json.loads(json.dumps(settings, default=str))  # as they are read again
    settings["versions"] = versions()
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        return settings
    results = json.loads(file.read_text())
    for key, value in settings.items():
        if results.get(key) != value:
            found = f"{file} has results with {key} {results.get(key)}, not {value}"
            sys.exit(f"{Path(sys.argv[0]).name}: {found}; delete it or choose another --out")
    return results


def versions() -> dict[str, str]:
    """Name the versions of the libraries that figures depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def table(title: str, columns: dict[str, str], rows: dict[str, dict]) -> str:
    """Print figures, or texts, as a Markdown table, one row for each name."""
    lines = [f"| {title} | " + " | ".join(columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        values = [row[column] for column in columns]
        cells = [value if isinstance(value, str) else f"{value:.1f}" for value in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
