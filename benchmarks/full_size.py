"""LiveEdit on a model of full size with random weights: `python benchmarks/full_size.py` (about 20 GiB of memory in bfloat16).

Builds LLaVA-1.5-7B's shape without a download, then attaches an editor of the paper's settings, edits, generates three tokens, takes one
training step with the smallest batch, saves and loads the editor, and prints seconds and peak memory of each. Answers mean nothing here.
On a GPU also: prefill and time per token at 0, 100 and 500 edits, all of them kept, against the unedited model.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from liveedit import EDIT, LOCALITY, LiveEdit, LiveEditConfig, Question  # noqa: E402
from run import peak_memory  # noqa: E402


def random_llava(device: str) -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B's configuration; weights small and random, made without a copy in single precision."""
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
                              patch_size=14, projection_dim=768)
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, pad_token_id=2)  # defaults are 7B's
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3, vision_feature_layer=-2, image_seq_length=576)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device=device)
    some = torch.randn(2**20, device=device, dtype=torch.bfloat16) * 0.02
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            for chunk in weight.data.view(-1).split(len(some)):
                chunk.copy_(some[:len(chunk)])
    for module in model.modules():  # buffers have no values yet either
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.numel(), device=device).view(module.position_ids.shape)
        if hasattr(module, "inv_freq"):
            module.inv_freq = (1.0 / 10000 ** (torch.arange(0, 128, 2, device=device) / 128)).float()
    return model.eval()


@contextlib.contextmanager
def timed(what: str):
    start = time.time()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"{what:<44}{time.time() - start:>8.1f} s   peak memory {peak_memory()}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = options.parse_args().device
    torch.manual_seed(0)
    with timed("random weights"):
        model = random_llava(device)
    tiny = AutoProcessor.from_pretrained(HERE / "tiny-llava")  # only its tokenizer and chat template are needed
    images = type(tiny.image_processor)(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = LlavaProcessor(images, tiny.tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
                               chat_template=tiny.chat_template)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters in {model.dtype} on {device}")
    with timed("attach an editor of the paper's settings"):
        editor = LiveEdit(model, processor, LiveEditConfig())
    picture = Image.effect_noise((336, 336), 60).convert("RGB")
    asked = [Question(picture, "What shape is this?", "heart"), Question(picture.transpose(Image.Transpose.ROTATE_90), "Which color is it?", "red")]
    with timed("one training step, two edits, four rows"):
        states = editor.capture([*asked, *asked])
        role, owner = torch.tensor([EDIT] * 2 + [LOCALITY] * 2, device=device), torch.tensor([0, 1] * 2, device=device)
        losses = editor.training_losses(states, role, owner)
        losses["total"].backward()
        torch.optim.Adam([p for p in editor.parameters() if p.grad is not None], lr=1e-4).step()
        editor.zero_grad()
        del states
    print("losses " + " ".join(f"{name} {value.item():.2f}" for name, value in losses.items()))
    with timed("one edit"):
        editor.edit(*asked[0])
    inputs = editor.encode(picture, "What shape is this?")
    with timed("three tokens, edited"):
        edited = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with timed("three tokens, the original"), editor.disabled():
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with tempfile.TemporaryDirectory() as folder:
        with timed("save the editor"):
            editor.save_pretrained(folder)
        editor.detach()
        with timed("load the editor"):
            editor = LiveEdit.from_pretrained(model, processor, folder)
    assert torch.equal(edited, model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)), "the loaded editor answers otherwise"
    print(f"{sum(p.numel() for p in editor.parameters()) / 1e6:.0f} M trained parameters, {editor.experts.bytes_per_edit() / 1024:.0f} KiB per edit")
    if device.startswith("cuda"):
        overhead(editor, inputs)


def overhead(editor: LiveEdit, inputs: dict) -> None:
    """Prefill and time per token with copies of one expert that the filter all keeps (the worst case), in one run."""
    experts = editor.experts
    editor.router.threshold = -1.0
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    row = {name: getattr(experts, name)[:1].clone() for name in experts.TENSORS}
    record = experts.edits[0]
    for count in (0, 100, 500):
        editor.reset()
        edits = [type(record)(i + 1000 * count + 1, f"question {i}", "x", record.image_digest, 0.0) for i in range(count)]
        if edits:
            experts.add({name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in row.items()}, edits)
        seconds = {}
        for tokens in (1, 33):
            generate = lambda: editor.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            generate(), finish()
            start = time.time()
            for _ in range(5):
                generate()
            finish()
            seconds[tokens] = (time.time() - start) / 5
        print(f"{count} edits: prefill {1000 * seconds[1]:.1f} ms, each further token {1000 * (seconds[33] - seconds[1]) / 32:.1f} ms")


if __name__ == "__main__":
    main()
