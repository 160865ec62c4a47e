"""One question to a saved editor.

    python benchmarks/ask.py --editor output/editor --image cat.png "What is it?"

Prints the answer before and after the edits, and the edits that it uses.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import ImageFile
from liveedit import LiveEdit
from run import load_model, set_up_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--editor", type=Path, required=True, help="a saved editor")
    parser.add_argument(
        "--image", type=Path, help="a picture file; without it a text-only question"
    )
    parser.add_argument("--model", default="tiny-llava", help="the model that it was trained on")
    parser.add_argument(
        "--device", default="auto", help="auto (an accelerator, else cpu) or a torch device"
    )
    parser.add_argument("--dtype", default="auto", help="of the model")
    given = parser.parse_args()
    set_up_process()
    try:
        picture = ImageFile(given.image).open() if given.image else None
        model, processor = load_model(given.model, given.device, given.dtype)
        editor = LiveEdit.from_pretrained(model, processor, given.editor)
        inputs = editor.encode(picture, given.question)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        sys.exit(f"ask.py: {error}")

    def reply() -> str:
        made = model.generate(**inputs, max_new_tokens=50, do_sample=False)
        prompt = inputs["input_ids"].shape[1]
        return processor.decode(made[0, prompt:], skip_special_tokens=True).strip()

    with editor.disabled():
        print(f"before: {reply()}")
    print(f"after:  {reply()}")
    for used in editor.explain(inputs)[0]:
        similarity = f"similarity {used['similarity']:.3f} above {used['threshold']:.3f}"
        fact = f"{used['prompt']} -> {used['target']}"
        print(f"edit {used['id']}, weight {used['weight']:.3f}, {similarity}: {fact}")


if __name__ == "__main__":
    main()
