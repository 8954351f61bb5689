"""Converts a GGUF file for peers: to another of llama.cpp's types, or to a folder of safetensors.

    python -m loadtest.bench.peers.convert MODEL TARGET Q4_0|Q8_0|...|bfloat16

llama.cpp is fastest in Q4_0, which the default model does not come in. A requantised file runs at
the speed of its type; its quality is at best that of the original, in Q4_0 somewhat worse.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gguf


def main_type(model: Path) -> str:
    """The type of most matrices: Q4_1, Q8_0, F16, ..."""
    import gguf

    tensors = gguf.GGUFReader(model).tensors
    counted = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
    return str(counted.most_common(1)[0][0])


def path_of(model: Path, kind: str, *, folder: Path) -> Path:
    """Path of the model in this type: the file itself, or one in `folder` that may not exist."""
    return model if main_type(model) == kind else folder / f"{model.stem}.as-{kind}.gguf"


def requantise(model: Path, target: Path, *, kind: str) -> None:
    """Writes `target` atomically, unless it exists. The embedding keeps its type."""
    import gguf

    if target == model or target.exists():
        return
    reader = gguf.GGUFReader(model)
    old = gguf.GGMLQuantizationType[main_type(model)]
    part = target.with_suffix(".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(part, str(reader.fields["general.architecture"].contents()))
    _copy_fields(reader, writer, file_type=gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for tensor in reader.tensors:
        data, new = tensor.data, tensor.tensor_type
        if new == old and len(tensor.shape) > 1:
            new = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(gguf.quants.dequantize(data, old), new)
        writer.add_tensor(tensor.name, data, raw_dtype=new)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, *, file_type: int) -> None:
    """Copies the header but for the file type; the writer has set the architecture."""
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = file_type if name == "general.file_type" else field.contents()
        element = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], sub_type=element)


def write_folder(model: Path, folder: Path) -> None:
    """Writes a bfloat16 folder for `transformers serve` and vLLM, unless it exists.

    It has no end token, because `transformers serve` has no `ignore_eos`.
    """
    import torch
    import transformers

    if (folder / "tokenizer.json").exists():  # written last
        return
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent,
        gguf_file=model.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    network.generation_config.eos_token_id = None
    network.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    source, destination, to = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if to == "bfloat16":
        write_folder(source, destination)
    else:
        requantise(source, destination, kind=to)
