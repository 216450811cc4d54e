"""What compression costs a real model: captured queries, keys and values, perplexity, and retrieval.

    capture     post-RoPE queries, keys and values of chosen layers of a model that reads a text
    logits      on captured tensors: logits, softmax, attention output and selection of every preset against exact ones
    perplexity  of a model that decodes a text with a preset's cache, against its own attention
    needle      whether that model still finds a sentence in a long text

Presets take part by being in `kvbench.caches.PRESETS`; `specs` says how options of theirs are written.
"""
