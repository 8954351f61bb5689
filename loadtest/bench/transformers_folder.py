"""Writes a GGUF file as the folder that `transformers serve` can load: bfloat16 safetensors.

Generation has no end token there, because its server has no `ignore_eos`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(gguf: Path, folder: Path) -> None:
    """Reads the one and writes the other; a folder that is there already is left as it is."""
    import torch
    import transformers

    if (folder / "tokenizer.json").exists():  # written last
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
