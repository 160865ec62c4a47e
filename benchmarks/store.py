"""What a store of many edits costs: `python benchmarks/store.py`.

`--width 4096` takes a 7B model's width: two thin random layers, and the editor of the paper.
Experts are synthetic (random keys, none near the query but four that are planted); all else is
real: edits, the filter and the router, forgetting, saving and loading.
"""

import argparse
import functools
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
from liveedit import Edit, LiveEdit, LiveEditConfig, Question
from router import Features, Rows
from run import peak_memory

PROMPT = "What shape is this?"
COLUMN = 10  # characters of a number


def backbone(width: int | None):
    """Load the tiny LLaVA, or make one with random layers of the given hidden size."""
    if width is None:
        return AutoModelForImageTextToText.from_pretrained(HERE / "tiny-llava").eval()
    config = AutoConfig.from_pretrained(HERE / "tiny-llava")
    sizes = {"hidden_size": width, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": width // 32}
    config.text_config.update(sizes | heads)
    return AutoModelForImageTextToText.from_config(config).eval()


def seconds(call) -> float:
    """Time one call, with what it leaves to a GPU."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def milliseconds(*calls, repeats: int = 20) -> list[float]:
    """Median time of each call, taken in turn."""
    rounds = [[1000 * seconds(call) for call in calls] for _ in range(repeats + 1)]
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]


def grow(editor: LiveEdit, count: int, planted: torch.Tensor) -> None:
    """Add random experts up to a count, in blocks; the first four keep the planted visual key."""
    config, width, device = editor.config, editor.norm.weight.numel(), editor.norm.weight.device
    while len(editor.experts) < count:
        n = min(1000, count - len(editor.experts))
        expert, key = (n, config.rank, width), (n, config.slots, config.module_dim)
        tensors = {name: 0.01 * torch.randn(expert, device=device) for name in ("U", "V")}
        for name in ("visual_keys", "text_keys"):
            tensors[name] = F.normalize(torch.randn(key, device=device), dim=-1)
        if len(editor.experts) == 0:
            tensors["visual_keys"][:4] = planted
        ids = range(editor.experts.next_id, editor.experts.next_id + n)
        editor.experts.add(tensors, [Edit(i, f"question {i}", f"answer {i}", 0.0) for i in ids])


def asking(editor: LiveEdit, features: Features, inputs: dict) -> dict[str, float]:
    """Milliseconds of one query: product with all keys, the rest of the routing, model call."""
    router = editor.router
    visual_keys, text_keys = editor.experts.rows("visual_keys"), editor.experts.rows("text_keys")
    kept = len(router.route(features, visual_keys, text_keys).experts)
    assert kept == 4, f"{kept} experts are kept, not the four that were planted"
    product, whole, model = milliseconds(
        lambda: router.visual_similarity(features.visual, visual_keys),
        lambda: router.route(features, visual_keys, text_keys),
        lambda: editor.model(**inputs),
    )
    return {"product": product, "the rest": whole - product, "model": model}


def changing(editor: LiveEdit, picture: Image.Image, planted: torch.Tensor) -> dict[str, float]:
    """Milliseconds of one edit, and of forgetting the oldest that is not planted."""
    count = len(editor.experts)
    times = [seconds(lambda: editor.edit(picture, "Which?", "red")) for _ in range(5)]
    gone = [edit.id for edit in editor.edits()[4:9]]
    forget = seconds(lambda: [editor.forget(edit_id) for edit_id in gone]) / len(gone)
    grow(editor, count, planted)
    return {"edit": 1000 * statistics.median(times), "forget": 1000 * forget}


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--width", type=int, help="hidden size of a random backbone")
    sizes = [100, 1000, 10_000, 100_000]
    options.add_argument("--experts", type=int, nargs="+", default=sizes, help="of the store")
    given = options.parse_args()
    torch.manual_seed(0)
    model, processor = backbone(given.width), AutoProcessor.from_pretrained(HERE / "tiny-llava")
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    width = {} if given.width else {"module_dim": 128}
    editor = LiveEdit(model, processor, LiveEditConfig(threshold=0.5, sentinel_tokens=36, **width))
    editor.trained_steps = 1  # of random weights: the edits mean nothing here
    inputs = editor.encode(picture, PROMPT)
    states = editor.capture([Question(picture, PROMPT, "x")], above=False)
    prompt = Rows.gather(states.hidden, states.masks.prompt)
    image = Rows.gather(states.hidden, states.masks.image)
    features = editor.router.features(prompt, image)
    print(
        f"width {editor.norm.weight.numel()}, {editor.experts.bytes_per_edit() / 1024:.1f} KiB per "
        f"edit, {torch.get_num_threads()} threads; the unedited model takes "
        f"{milliseconds(lambda: model(**inputs))[0]:.1f} ms for the query"
    )
    for count in given.experts:
        first = len(editor.experts) == 0
        grow(editor, count, features.visual)
        row = asking(editor, features, inputs) | changing(editor, picture, features.visual)
        with tempfile.TemporaryDirectory() as name:
            row["save"] = seconds(functools.partial(editor.save_pretrained, name))
            row["again"] = seconds(functools.partial(editor.save_pretrained, name))
            expected = model(**inputs).logits
            editor.detach()
            editor = None  # two big stores might not fit
            gc.collect()
            start = time.perf_counter()
            editor = LiveEdit.from_pretrained(model, processor, name)
            row["load"] = time.perf_counter() - start
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-4), "it answers otherwise"
        if first:
            print("ms: product, the rest, model, edit, forget; s: save, again, load")
            print(f"{'experts':>8}" + "".join(f"{key:>{COLUMN}}" for key in row) + "   peak memory")
        numbers = "".join(f"{value:>{COLUMN}.2f}" for value in row.values())
        print(f"{count:>8}{numbers}   {peak_memory()}", flush=True)


if __name__ == "__main__":
    main()
