"""A tiny random model with its tokenizer, as a folder that transformers reads: nothing is downloaded."""
from __future__ import annotations

TEXT = "the cat sat on the mat and the dog saw the cat run to the red door of a small old house by the sea . " * 12


def save_tiny(folder, **changes) -> None:
    """Llama with 2 layers, 4 query heads, 2 KV heads, head_dim 32, and a word-level tokenizer of TEXT's words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    needle = "The secret number of is . Question : What the ? Answer Lisbon Vienna Oslo Cairo Lima Dublin Athens Warsaw"
    words = ["<unk>", *dict.fromkeys([*TEXT.split(), *needle.split(), *"0123456789"])]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(**{**dict(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=None, eos_token_id=None), **changes})
    network = LlamaForCausalLM(config)
    with torch.no_grad():                       # attention of a fresh model is nearly uniform
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(8)
    network.save_pretrained(folder)
