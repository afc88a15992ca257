"""The files by which transformers' AutoTokenizer gives the very ids that a model was trained on."""

import json

from megagpt.data.tokenizer import Tokenizer

START, DELIMITER, EXTRACT = "<|task_start|>", "<|task_delimiter|>", "<|task_extract|>"


def tokenizer_files(tokenizer: Tokenizer, longest: int, *, padding: str | None = None) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json, by name; ``longest`` in tokens."""
    special = {}
    if tokenizer.eot_id is not None:
        end = next(t["content"] for t in tokenizer.definition["added_tokens"] if t["id"] == tokenizer.eot_id)
        special = {"bos_token": end, "eos_token": end}
    unknown = tokenizer.definition["model"].get("unk_token")
    if isinstance(unknown, str):
        special["unk_token"] = unknown
    if padding is not None:
        special["pad_token"] = padding
    about = {
        # Not GPT2Tokenizer or OpenAIGPTTokenizer, which bring rules of their own for cutting text.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        # Without token_type_ids, whose embeddings both models would add.
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
    }
    return {
        "tokenizer.json": tokenizer.json,
        "tokenizer_config.json": json.dumps(about, indent=2, ensure_ascii=False).encode(),
        "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False).encode(),
    }


def with_task_tokens(tokenizer: Tokenizer, n_rows: int) -> Tokenizer:
    """``tokenizer`` with the three task tokens, the last of ``n_rows`` rows, set around a text or two.

    Rows between the vocabulary and these get names too: ids have to follow each other.
    """
    first = n_rows - 3
    unused = [f"<|unused_{i}|>" for i in range(tokenizer.vocab_size, first)]
    names = [*unused, START, DELIMITER, EXTRACT]
    definition = dict(tokenizer.definition)
    definition["added_tokens"] = [
        *(definition.get("added_tokens") or []),
        *(_added_token(i, name) for i, name in enumerate(names, tokenizer.vocab_size)),
    ]
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [_special(START), _sequence("A"), _special(EXTRACT)],
        "pair": [_special(START), _sequence("A"), _special(DELIMITER), _sequence("B"), _special(EXTRACT)],
        "special_tokens": {
            name: {"id": name, "ids": [first + i], "tokens": [name]}
            for i, name in enumerate((START, DELIMITER, EXTRACT))
        },
    }
    return Tokenizer(json.dumps(definition, ensure_ascii=False).encode(), "the tokenizer with task tokens")


def _added_token(i: int, name: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **flags, "special": True}


def _special(name: str) -> dict:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def _sequence(name: str) -> dict:
    return {"Sequence": {"id": name, "type_id": 0}}
