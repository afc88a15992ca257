"""The README.md of an exported folder."""

import json

from megagpt.export.check import TOLERANCE, Comparison
from megagpt.finetune.spec import TaskSpec
from megagpt.model.config import GPTConfig
from megagpt.model.hf_config import MODEL_TYPES
from megagpt.model.tensors import DTYPES


def model_card(
    name: str,
    config: GPTConfig,
    comparison: Comparison | None,
    *,
    dtype: str,
    origin: str,
    tokenizer_sha256: str,
    spec: TaskSpec | None = None,
) -> str:
    """What the model is, where it comes from and how far transformers' logits are from its own."""
    task = "text-classification" if spec else "text-generation"
    rows = [
        ("form", f"transformers' `{MODEL_TYPES[config.norm]}`"),
        ("parameters", f"{config.n_params():,}"),
        ("blocks, width, heads", f"{config.n_layer}, {config.d_model}, {config.n_head}"),
        ("context", f"{config.seq_len:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("weights", _written(dtype)),
        ("exported from", f"`{origin}`"),
        ("tokenizer", f"SHA-256 `{tokenizer_sha256}`"),
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags:
- megagpt
- {MODEL_TYPES[config.norm]}
---

# {name}

A model trained with MegaGPT.

| | |
|---|---|
{table}

## Checked

{_checked(comparison)}

## Use

```python
from transformers import pipeline

{_usage(task)}
```
{_of_task(spec) if spec else ""}"""


def _written(dtype: str) -> str:
    name = DTYPES[dtype][1]
    return name if dtype == "fp32" else f"{name}, rounded from float32"


def _checked(comparison: Comparison | None) -> str:
    if comparison is None:
        return "Not checked against transformers, which was not installed where this folder was made."
    return (
        f"Largest difference of a logit between MegaGPT and transformers {comparison.version}, with these weights in "
        "float32 on the CPU, "
        f"over {comparison.n_windows} windows of {comparison.n_tokens} tokens in all: **{comparison.difference:.1e}** "
        f"(allowed: {TOLERANCE:.0e})."
    )


def _usage(task: str) -> str:
    if task == "text-generation":
        return 'print(pipeline("text-generation", model=".")("It was a dark night", max_new_tokens=40))'
    return 'print(pipeline("text-classification", model=".")("It was a dark night"))'


def _of_task(spec: TaskSpec) -> str:
    """What the classes of transformers cannot hold of a fine-tuned model."""
    lines = [
        f"## Task {spec.task}",
        f"Labels: {json.dumps(spec.labels, ensure_ascii=False) if spec.labels else 'a number'}. The tokenizer sets the "
        "task tokens around a text, or around two, and the class is read at the last of them.",
        "The head's bias is part of the last LayerNorm's: the layer here has none.",
    ]
    if spec.clean != "none":
        lines.append(f"Texts were cleaned before they were cut into tokens (`--clean {spec.clean}`); do the same.")
    if spec.kind == "entail":
        lines.append("Of two texts, each was cut to half the context before; cut long ones likewise.")
    if spec.document_tokens:
        lines.append("Longer texts were read in several windows, of which the last one counts; here they are cut.")
    if spec.ordinal:
        lines.append("The classes are whole numbers in order: the answer is the sum of each times its probability.")
    return "\n\n" + "\n\n".join(lines) + "\n"
