"""LiveEdit on a model of full size with random weights: `python benchmarks/full_size.py`.

Builds LLaVA-1.5-7B's shape without a download (about 20 GiB of memory in bfloat16), then attaches
an editor of the paper's settings, edits, generates three tokens, takes one training step with the
smallest batch, saves and loads the editor, and prints seconds and peak memory of each. Answers mean
nothing here. On a GPU of 80 GB also: training steps of the paper's batch, and prefill and tokens
beside the bare model's, with 0 to 100,000 edits.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import run
from benchmarks.common import versions
from benchmarks.speed import cost_of_a_question
from benchmarks.store import grow
from drawn import drawn_samples, split_scenes
from liveedit import LiveEdit, LiveEditConfig, Question
from router import Rows

TOKENS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def random_llava(device: str) -> LlavaForConditionalGeneration:
    """Make LLaVA-1.5-7B's configuration; weights small and random, without a second copy."""
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    tower |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, **ids)  # defaults are 7B's
    vision = CLIPVisionConfig(**tower, projection_dim=768)
    shape = {"image_token_id": 3, "vision_feature_layer": -2, "image_seq_length": 576}
    with torch.device("meta"):
        config = LlavaConfig(vision_config=vision, text_config=text, **shape)
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device=device)
    some = torch.randn(2**20, device=device, dtype=torch.bfloat16) * 0.02
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            for chunk in weight.data.view(-1).split(len(some)):
                chunk.copy_(some[: len(chunk)])
    for module in model.modules():  # buffers have no values yet either
        if hasattr(module, "position_ids"):
            count, places = module.position_ids.numel(), module.position_ids.shape
            module.position_ids = torch.arange(count, device=device).view(places)
        if hasattr(module, "inv_freq"):
            steps = torch.arange(0, 128, 2, device=device) / 128
            module.inv_freq = (1.0 / 10000**steps).float()
    return model.eval()


@contextlib.contextmanager
def timed(what: str):
    """Print seconds and peak memory of a block."""
    start = time.time()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"{what:<44}{time.time() - start:>8.1f} s   peak {run.peak_memory()}", flush=True)


def processor_of_full_size() -> LlavaProcessor:
    """Take tiny-llava's tokenizer and chat template, and pictures of full size."""
    tiny = AutoProcessor.from_pretrained(HERE / "tiny-llava")
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    shape = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    shape |= {"num_additional_image_tokens": 1, "chat_template": tiny.chat_template}
    return LlavaProcessor(type(tiny.image_processor)(**size), tiny.tokenizer, **shape)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = options.add_argument("--device", default=default) and options.parse_args().device
    torch.manual_seed(0)
    with timed("random weights"):
        model = random_llava(device)
    processor = processor_of_full_size()
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    print(f"{billions:.2f} billion parameters in {model.dtype} on {device}")
    with timed("attach an editor of the paper's settings"):
        editor = LiveEdit(model, processor, LiveEditConfig())
    picture = Image.effect_noise((336, 336), 60).convert("RGB")
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    asked = [Question(picture, "What shape?", "heart"), Question(turned, "Which color?", "red")]
    with timed("one training step, two edits, six rows"):
        states = editor.capture(asked)
        losses = editor.training_losses([(states, states, states)])
        losses["total"].backward()
        trained = [parameter for parameter in editor.parameters() if parameter.grad is not None]
        torch.optim.Adam(trained, lr=1e-4).step()
        editor.zero_grad()
        del states
    print("losses " + " ".join(f"{name} {value.item():.2f}" for name, value in losses.items()))
    with timed("one edit"):
        editor.edit(*asked[0])
    inputs = editor.encode(picture, "What shape?")
    with timed("three tokens, edited"):
        edited = model.generate(**inputs, **TOKENS)
    with timed("three tokens, the original"), editor.disabled():
        model.generate(**inputs, **TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        with timed("save the editor"):
            editor.save_pretrained(folder)
        editor.detach()
        with timed("load the editor"):
            editor = LiveEdit.from_pretrained(model, processor, folder)
    again = model.generate(**inputs, **TOKENS)
    assert torch.equal(edited, again), "the loaded editor answers otherwise"
    millions = sum(parameter.numel() for parameter in editor.parameters()) / 1e6
    per_edit = editor.experts.bytes_per_edit() / 1024
    print(f"{millions:.0f} M trained parameters, {per_edit:.0f} KiB per edit")
    if device.startswith("cuda"):
        editor.reset()
        found = {"model": "LLaVA-1.5-7B's shape", "device": torch.cuda.get_device_name()}
        found["versions"] = versions()
        found["training"] = paper_steps(editor)
        found["question"] = overhead(editor, asked[0])
        file = HERE / "output" / "full_size.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1))


def paper_steps(editor: LiveEdit, steps: int = 4) -> dict:
    """Time training steps of the paper's batch, of edits with the queries that E-VQA has."""
    options, batch_size = run.parse_options(["--out", "output/full_size"]), run.PAPER["batch_size"]
    for name, value in run.PAPER.items():
        setattr(options, name, value)
    samples = drawn_samples(batch_size * (steps + 1), split_scenes()[0], "full size", False)
    run.CACHE_BYTES = 0  # as with E-VQA's thousands of samples: each step runs the lower layers
    training_set = run.TrainingSet(editor, samples, options)
    optimizers = run.make_optimizers(editor, run.PAPER["learning_rate"], "paper")
    times = []
    for number in range(steps + 1):
        began = time.time()
        batch = training_set.batch(number)
        editor.zero_grad()
        editor.training_losses(*batch)["total"].backward()
        run.cut_gradients(editor)
        for optimizer in optimizers:
            optimizer.step()
        torch.cuda.synchronize()
        times.append(time.time() - began)
    editor.zero_grad()
    step, count = statistics.median(times[1:]), run.PAPER["train_steps"]
    found = {"edits": batch_size, "rows": 3 * batch_size, "seconds": step}
    found |= {"hours": count * step / 3600, "peak_memory": run.peak_memory()}
    print(f"training steps of the paper's batch, hours of {count}: {found}", flush=True)
    return found


def overhead(editor: LiveEdit, asked: Question) -> list[dict]:
    """Time prefill and tokens beside the bare model's, with up to four edits used."""
    bare, editor.router.threshold = random_llava("cuda"), 0.5
    inputs = editor.encode(asked.image, asked.prompt)
    states = editor.capture([asked], above=False)
    prompt = Rows.gather(states.hidden.float(), states.masks.prompt)
    image = Rows.gather(states.hidden.float(), states.masks.image)
    with torch.no_grad():
        planted = editor.router.features(prompt, image).visual
    rows = []
    for count in (0, 1, 500, 10_000, 100_000):
        editor.reset()
        grow(editor, count, planted)
        assert bool(editor.explain(inputs)[0]) == bool(count)
        rows.append({"edits": count} | cost_of_a_question(editor.model, bare, inputs))
        rows[-1]["peak_memory"] = run.peak_memory()
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
