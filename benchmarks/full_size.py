"""LiveEdit on a model of full size with random weights: `python benchmarks/full_size.py`.

Builds LLaVA-1.5-7B's shape without a download (about 20 GiB of memory in bfloat16), then attaches
an editor of the paper's settings, edits, generates three tokens, takes one training step with the
smallest batch, saves and loads the editor, and prints seconds and peak memory of each. Answers mean
nothing here. On a GPU also: prefill and time per token at 0, 100 and 500 edits, all of them kept.
"""

import argparse
import contextlib
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
from liveedit import EDIT, LOCALITY, Edit, LiveEdit, LiveEditConfig, Question
from run import peak_memory

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
    print(f"{what:<44}{time.time() - start:>8.1f} s   peak {peak_memory()}", flush=True)


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
    with timed("one training step, two edits, four rows"):
        states = editor.capture([*asked, *asked])
        role = torch.tensor([EDIT, EDIT, LOCALITY, LOCALITY], device=device)
        losses = editor.training_losses(states, role, torch.tensor([0, 1, 0, 1], device=device))
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
        overhead(editor, inputs)


def overhead(editor: LiveEdit, inputs: dict) -> None:
    """Time prefill and tokens with copies of one expert that the filter all keeps."""
    experts, names = editor.experts, editor.experts.TENSORS
    editor.router.threshold = -1.0
    row = {name: experts.rows(name)[:1].clone() for name in names}
    for count in (0, 100, 500):
        editor.reset()
        if count:
            first = experts.next_id
            edits = [Edit(first + i, f"question {i}", "x", 0.0) for i in range(count)]
            experts.add({name: row[name].expand(count, -1, -1) for name in names}, edits)
        taken = {}
        for tokens in (1, 33):
            settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            editor.model.generate(**inputs, **settings)
            torch.cuda.synchronize()
            start = time.time()
            for _ in range(5):
                editor.model.generate(**inputs, **settings)
            torch.cuda.synchronize()
            taken[tokens] = (time.time() - start) / 5
        prefill, token = 1000 * taken[1], 1000 * (taken[33] - taken[1]) / 32
        print(f"{count} edits: prefill {prefill:.1f} ms, each further token {token:.1f} ms")


if __name__ == "__main__":
    main()
