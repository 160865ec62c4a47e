"""What a store of many edits costs: `python benchmarks/store.py` (tiny-llava), `python benchmarks/store.py --width 4096` (a 7B model's width).

Experts are synthetic (random keys, none near the query but four that are planted), all else is real: edits, the filter and the router, forgetting,
saving and loading. For the width of a 7B model the backbone is LLaVA's with two thin random layers, and the editor has the paper's settings.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from liveedit import Edit, LiveEdit, LiveEditConfig, Question  # noqa: E402
from router import Query, Rows  # noqa: E402
from run import peak_memory  # noqa: E402

PROMPT = "What shape is this?"
WIDTH = 10  # of a column


def backbone(width: int | None):
    """The tiny LLaVA, or one with random layers of the given hidden size."""
    if width is None:
        return AutoModelForImageTextToText.from_pretrained(HERE / "tiny-llava").eval()
    config = AutoConfig.from_pretrained(HERE / "tiny-llava")
    config.text_config.update({"hidden_size": width, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 32,
                               "num_key_value_heads": 32, "head_dim": width // 32})
    return AutoModelForImageTextToText.from_config(config).eval()


def milliseconds(*calls, repeats: int = 20) -> list[float]:
    """Median time of each call, taken in turn."""
    times = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, taken in zip(calls, times):
            taken.append(1000 * seconds(call))
    return [statistics.median(taken[1:]) for taken in times]


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def grow(editor: LiveEdit, count: int, planted: torch.Tensor) -> None:
    """Add random experts up to a count, in blocks; the first four of all keep the planted visual key."""
    config, width = editor.config, editor.norm.weight.numel()
    while (present := len(editor.experts)) < count:
        n = min(1000, count - present)
        features = lambda: F.normalize(torch.randn(n, config.slots, config.module_dim), dim=-1)
        tensors = {"U": 0.01 * torch.randn(n, config.rank, width), "V": 0.01 * torch.randn(n, config.rank, width), "visual_keys": features(),
                   "text_keys": features(), "visual_queries": features(), "text_queries": features(), "sentinels": torch.full((n,), 0.5)}
        if present == 0:
            tensors["visual_keys"][:4] = planted
        first = editor.experts.next_id
        editor.experts.add(tensors, [Edit(first + i, f"question {first + i}", f"answer {first + i}", f"{first + i:032x}", 0.0) for i in range(n)])


def asking(editor: LiveEdit, query: Query, inputs: dict) -> dict[str, float]:
    """Milliseconds of one query: the product with all visual keys, the whole routing of given features, its difference, the model, and explain."""
    experts, router = editor.experts, editor.router
    route = lambda: router.route(query, experts.visual_keys, experts.text_keys, experts.active)
    assert len(route().experts) == 4, f"{len(route().experts)} experts are kept, not the four that were planted"
    product, whole = milliseconds(lambda: router.visual_similarity(query.visual, experts.visual_keys), route)
    model, explain = milliseconds(lambda: editor.model(**inputs), lambda: editor.explain(inputs))
    return {"product": product, "routing": whole, "the rest": whole - product, "model": model, "explain": explain}


def changing(editor: LiveEdit, picture: Image.Image, planted: torch.Tensor) -> dict[str, float]:
    """Milliseconds of one edit (with the search for older ones of the same fact), and of forgetting one among all."""
    count = len(editor.experts)
    edit = statistics.median(1000 * seconds(lambda: editor.edit(picture, "Which color is it?", "red")) for _ in range(5))
    gone = [editor.experts.edits[count // 2 + i].id for i in range(count // 4)][:100]
    forget = 1000 * seconds(lambda: [editor.forget(i) for i in gone]) / len(gone)
    grow(editor, count, planted)
    return {"edit": edit, "forget": forget}


def files(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir()}


def saving(editor: LiveEdit, folder: Path, planted: torch.Tensor) -> dict[str, float]:
    """Seconds and MB of a whole save, and of one more with one edit more."""
    whole, before = seconds(lambda: editor.save_pretrained(folder)), files(folder)
    grow(editor, len(editor.experts) + 1, planted)
    one_more = seconds(lambda: editor.save_pretrained(folder))
    return {"save": whole, "MB": sum(before.values()) / 1e6, "one more": one_more,
            "MB more": sum(size for name, size in files(folder).items() if name not in before) / 1e6}


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, help="hidden size of a random backbone, with the paper's editor; default: tiny-llava")
    options.add_argument("--experts", type=int, nargs="+", default=[100, 1000, 10_000, 100_000], help="sizes of the store, growing")
    given = options.parse_args()
    torch.manual_seed(0)
    model, processor = backbone(given.width), AutoProcessor.from_pretrained(HERE / "tiny-llava")
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    editor = LiveEdit(model, processor, LiveEditConfig(threshold=0.5, sentinel_tokens=36, **({} if given.width else {"module_dim": 128})))
    editor.trained_steps = 1  # of random weights: the edits mean nothing here
    inputs, states = editor.encode(picture, PROMPT), editor.capture([Question(picture, PROMPT, "x")])
    prompt, image = Rows.gather(states.hidden, states.masks.prompt), Rows.gather(states.hidden, states.masks.image)
    # A trained sentinel is nearer to a query than experts of other pictures are. An untrained one is not; the picture itself is.
    editor.router.sentinel.copy_(image.states)
    query = editor.router.query(prompt, image)
    print(f"width {editor.norm.weight.numel()}, {editor.experts.bytes_per_edit() / 1024:.1f} KiB per edit, {torch.get_num_threads()} threads; "
          f"the unedited model takes {milliseconds(lambda: model(**inputs))[0]:.1f} ms for the query")
    for count in given.experts:
        present = len(editor.experts)
        row = {"add": 1000 * seconds(lambda: grow(editor, count, query.visual)) / (count - present)}
        row |= asking(editor, query, inputs) | changing(editor, picture, query.visual)
        with tempfile.TemporaryDirectory() as name:
            row |= saving(editor, Path(name), query.visual)
            expected = model(**inputs).logits
            editor.detach()
            editor = None  # two big stores might not fit
            gc.collect()
            start = time.perf_counter()
            editor = LiveEdit.from_pretrained(model, processor, name)
            row["load"] = time.perf_counter() - start
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-4), "the loaded store answers otherwise"
        if present == 0:
            print("ms: add, product, routing, the rest, model, explain, edit, forget; s: save, one more, load\n"
                  + f"{'experts':>8}" + "".join(f"{key:>{WIDTH}}" for key in row) + "   peak memory")
        print(f"{count:>8}" + "".join(f"{value:>{WIDTH}.2f}" for value in row.values()) + f"   {peak_memory()}", flush=True)


if __name__ == "__main__":
    main()
