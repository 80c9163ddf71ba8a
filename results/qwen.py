"""Makes models/qwen2.5-coder-0.5b-instruct from a GGUF file of it, once: `python results/qwen.py FILE.gguf [FOLDER]`.

Reading a GGUF takes a minute each time; the folder, its weights in bfloat16, loads in seconds.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

file = Path(sys.argv[1])
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "models/qwen2.5-coder-0.5b-instruct")
given = {"gguf_file": file.name}
model = AutoModelForCausalLM.from_pretrained(
    file.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **given
)
model.config.torch_dtype = torch.bfloat16
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(folder)
AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(folder)
print(folder)
