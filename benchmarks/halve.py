"""Copy a trained editor without its edits, in half precision, to ship it.

    python benchmarks/halve.py output/editor tiny-llava/editor

It loads like any other, into single precision.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from liveedit import EDITOR_FILE, LiveEdit
from run import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("editor", type=Path, help="a saved editor")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--model", default="tiny-llava", help="the model that it was trained on")
    given = parser.parse_args()
    model, processor = load_model(given.model, "cpu", "auto")
    editor = LiveEdit.from_pretrained(model, processor, given.editor)
    editor.reset()
    editor.experts.next_id = 1
    with torch.no_grad():  # rounded first, so that the editor's digest is that of what is loaded
        for parameter in editor.parameters():
            parameter.copy_(parameter.half())
    editor.save_pretrained(given.out)
    file = given.out / EDITOR_FILE
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for name in tensors:
        if name.startswith("networks."):
            tensors[name] = tensors[name].half()
    file.write_bytes(save(tensors, metadata))


if __name__ == "__main__":
    main()
