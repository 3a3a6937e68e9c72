"""Models on disk: our run folders and .ckpt files, state-spaces and transformers folders, read and written.

Weights are mapped from their file, not copied, and nothing that could execute code is ever unpickled.
"""

from simba_lab.checkpoint.convert import FORMATS, convert
from simba_lab.checkpoint.loading import load
from simba_lab.checkpoint.run_folder import SPEC_FILE, save_model
from simba_lab.checkpoint.spec import SPEC_KEY, model_spec
from simba_lab.checkpoint.tokenizer_file import TOKENIZER_FILE, tokenizer_path
from simba_lab.checkpoint.weights import SAFETENSORS_FILE as WEIGHTS_FILE

__all__ = [
    "FORMATS",
    "SPEC_FILE",
    "SPEC_KEY",
    "TOKENIZER_FILE",
    "WEIGHTS_FILE",
    "convert",
    "load",
    "model_spec",
    "save_model",
    "tokenizer_path",
]
