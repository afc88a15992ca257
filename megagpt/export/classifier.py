"""A fine-tuned model as GPT2ForSequenceClassification or OpenAIGPTForSequenceClassification."""

import torch

from megagpt.errors import CheckpointError
from megagpt.finetune.spec import TaskSpec
from megagpt.model.config import GPTConfig
from megagpt.model.hf_config import CLASSES, to_hf_config
from megagpt.model.interop import as_transformers
from megagpt.model.tensors import Tensors

_DECODER, _HEAD = "gpt.", "head.output."
_PROBLEMS = {
    "classify": "single_label_classification",
    "entail": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regress": "regression",
}


def check_form(spec: TaskSpec) -> None:
    """Raise CheckpointError, with the reason, for a task or a head that those classes do not compute."""
    if spec.head != "linear":
        why = f"its head is {spec.head}, and they have one linear layer over the last token's state"
    elif spec.kind == "choose":
        why = "it weighs the choices of a question against each other, and they see one text at a time"
    elif spec.kind == "similar" or (spec.kind == "regress" and len(spec.text_columns) > 1):
        why = "it adds up the states of both orders of its two texts, and they see one order"
    elif any(parent is not None for parent in spec.parents):
        why = "its labels are a hierarchy, in which a probability depends on those above it"
    else:
        return
    classes = " or ".join(f"{name}ForSequenceClassification" for name in CLASSES.values())
    raise CheckpointError(
        f"task {spec.task} has no form as transformers' {classes}: {why}; use it with megagpt predict"
    )


def classifier_config(config: GPTConfig, spec: TaskSpec, eot_id: int | None) -> dict:
    """The config.json. Texts are padded with the delimiter, which never is the last token: that one is scored."""
    labels = spec.labels if len(spec.labels) == spec.n_outputs else [f"LABEL_{i}" for i in range(spec.n_outputs)]
    return {
        **to_hf_config(config, eot_id),
        "architectures": [f"{CLASSES[config.norm]}ForSequenceClassification"],
        "pad_token_id": config.vocab_size - 2,
        "problem_type": _PROBLEMS[spec.kind],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def as_classifier(tensors: Tensors, config: GPTConfig, spec: TaskSpec) -> Tensors:
    """The parameters of a fine-tuned model under transformers' names.

    The layer there has no bias. The bias b is put where the last LayerNorm, whose output the layer W reads, has its
    own: W (x + d) = W x + b for the smallest d with W d = b. A number's scale and shift go the same way. Raises
    CheckpointError where there is no such d.
    """
    norm = "ln_f.bias" if config.norm == "pre" else f"blocks.{config.n_layer - 1}.ln_2.bias"
    weight = tensors.read(f"{_HEAD}weight").double() * spec.scale
    bias = tensors.read(f"{_HEAD}bias").double() * spec.scale + spec.shift
    moved = torch.linalg.pinv(weight) @ bias
    error = (weight @ moved - bias).abs().max().item()
    if not error <= 1e-6 * (1.0 + bias.abs().max().item()):
        raise CheckpointError(
            f"the biases of the head of task {spec.task} have no form in transformers' classes, which have none, since "
            "the rows of its weights depend on each other; use it with megagpt predict"
        )

    def read(name: str) -> torch.Tensor:
        x = tensors.read(_DECODER + name)
        return (x.double() + moved).float() if name == norm else x

    names = [name.removeprefix(_DECODER) for name in tensors.shapes if name.startswith(_DECODER)]
    decoder = as_transformers(Tensors({name: tensors.shapes[_DECODER + name] for name in names}, read), config)
    shapes = {**decoder.shapes, "score.weight": tuple(weight.shape)}
    return Tensors(shapes, lambda name: weight.float() if name == "score.weight" else decoder.read(name))
