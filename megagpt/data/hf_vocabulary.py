"""The tokenizer of a folder in Hugging Face's form."""

import json
from pathlib import Path

from megagpt.data.tokenizer import Tokenizer, from_file
from megagpt.data.vocabularies import is_folder_with_vocabulary, tokenizer_json

# Transformers' OpenAIGPTTokenizer cuts words as BERT does; the model was trained on spaCy's words, which are close.
_BERT_RULES = {
    "normalizer": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"},
}


def hf_tokenizer(folder: Path) -> Tokenizer | None:
    """What transformers reads from tokenizer.json, or from vocab.json and merges.txt; None where there is neither.

    Raises DataError for files that are no tokenizer.
    """
    if (folder / "tokenizer.json").is_file():
        return from_file(folder / "tokenizer.json")
    if not is_folder_with_vocabulary(folder):
        return None
    content = tokenizer_json(folder)
    definition = json.loads(content)
    if definition["model"].get("end_of_word_suffix"):
        content = json.dumps(definition | _BERT_RULES, ensure_ascii=False).encode()
    return Tokenizer(content, str(folder))
