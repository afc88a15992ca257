"""Models of Hugging Face's and OpenAI's that are read, and those that are refused with the reason."""

import json
import shutil

import numpy as np
import pytest
import torch
from data_common import PARAGRAPHS
from export_common import names_in, saved, tokenizer_of
from safetensors.torch import load_file, save_file

from megagpt.errors import CheckpointError, ConfigError, DataError
from megagpt.evaluate.source import open_source
from megagpt.export.importing import import_main
from megagpt.model.interop import as_transformers
from megagpt.model.tensors import Tensors
from megagpt.train import manifest

BLOCK = ["attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"]


def imported(source, to, *more):
    assert import_main(["--from", str(source), "--to", str(to), *map(str, more)]) == 0
    return load_file(to / "model.safetensors")


@pytest.fixture(scope="module", params=["pre", "post"])
def theirs(request, tmp_path_factory):
    """A folder as transformers writes it, with the model that it was written from."""
    from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

    torch.manual_seed(0)
    tokenizer = tokenizer_of(request.param)
    shape = {"vocab_size": tokenizer.vocab_size, "n_positions": 24, "n_layer": 2, "n_head": 2, "n_embd": 32}
    shape |= {"bos_token_id": None, "eos_token_id": None}
    pre = request.param == "pre"
    model = GPT2LMHeadModel(GPT2Config(**shape)) if pre else OpenAIGPTLMHeadModel(OpenAIGPTConfig(**shape))
    folder = tmp_path_factory.mktemp(request.param) / "theirs"
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder, model.eval()


@torch.no_grad()
def test_a_folder_of_transformers_gives_its_logits_directly_and_imported(theirs, tmp_path):
    folder, model = theirs
    imported(folder, tmp_path / "ours")
    ids = torch.arange(20)[None] * 7
    for place in (folder, tmp_path / "ours"):
        torch.testing.assert_close(open_source(place).build("cpu")(ids), model(ids).logits, rtol=0, atol=1e-5)


def test_bfloat16_weights_are_read_without_loss(theirs, tmp_path):
    folder, model = theirs
    model = type(model)(model.config).bfloat16()
    model.save_pretrained(tmp_path / "bf16")
    shutil.copy(folder / "tokenizer.json", tmp_path / "bf16")
    found = imported(tmp_path / "bf16", tmp_path / "ours")
    table = model.get_input_embeddings().weight
    assert torch.equal(found["wte.weight"], table.float())


def test_training_starts_from_an_imported_model_and_tells_what_to_do_with_a_foreign_one(theirs, tmp_path):
    folder, _ = theirs
    imported(folder, tmp_path / "ours")
    source = manifest.read_decoder_source(tmp_path / "ours")
    assert source.model["d_model"] == 32
    assert source.tokenizer_sha256 == open_source(folder).tokenizer.sha256
    with pytest.raises(CheckpointError, match=r"megagpt import --from .* --to FOLDER"):
        manifest.read_decoder_source(folder)


def test_vocabulary_files_are_cut_into_words_as_transformers_does(theirs, tmp_path):
    """Their GPT-1 tokenizer cuts as BERT does, and not by the rules that stand in for spaCy's here."""
    from transformers import GPT2Tokenizer, OpenAIGPTTokenizer

    folder, model = theirs
    shutil.copytree(folder, tmp_path / "files")
    model_of_it = json.loads((tmp_path / "files" / "tokenizer.json").read_text())["model"]
    (tmp_path / "files" / "tokenizer.json").unlink()
    (tmp_path / "files" / "vocab.json").write_text(json.dumps(model_of_it["vocab"]))
    merges = [" ".join(pair) for pair in model_of_it["merges"]]
    (tmp_path / "files" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    kind = GPT2Tokenizer if model.config.model_type == "gpt2" else OpenAIGPTTokenizer
    expected = kind.from_pretrained(tmp_path / "files")
    found = open_source(tmp_path / "files").tokenizer
    for text in PARAGRAPHS:
        assert found.encode(text) == expected(text)["input_ids"]


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def damage_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"wte.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lost_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"wte.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


BAD_FOLDERS = {
    "another architecture": (lambda f: rewrite(f, model_type="llama"), "type 'llama'; gpt2 and openai-gpt are read"),
    "a classifier": (lambda f: rewrite(f, architectures=["GPT2ForSequenceClassification"]), "the language models"),
    "activation": (lambda f: rewrite(f, activation_function="relu", afn="relu"), "is 'relu', and a model of MegaGPT"),
    "quantised": (lambda f: rewrite(f, quantization_config={"bits": 4}), "quantization_config is"),
    "a size that is none": (lambda f: rewrite(f, n_layer="2"), "describes no model: n_layer='2'"),
    "a rate that is none": (lambda f: rewrite(f, attn_pdrop="x"), "attn_pdrop is 'x' and has to be a number"),
    "absurd depth": (lambda f: rewrite(f, n_layer=10**9), "1,000,000,000 blocks need more"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "missing tensors": (
        lambda f: damage_weights(f, lambda s: [s.pop(n) for n in list(s) if "h.1.ln_1" in n]),
        r"lack h\.1\.ln_1\.bias, h\.1\.ln_1\.weight, which",
    ),
    "extra tensors": (
        lambda f: damage_weights(f, lambda s: s.update(other=torch.zeros(1), more=torch.zeros(1))),
        "hold more, other, which",
    ),
    "a head of its own": (
        lambda f: damage_weights(f, lambda s: s.update({"lm_head.weight": torch.ones(1)})),
        "lm_head.weight differs",
    ),
    "whole numbers": (
        lambda f: damage_weights(f, lambda s: s.update(x=torch.zeros(1, dtype=torch.int8))),
        "x in .* is of type I8",
    ),
    "a pickle": (only_a_pickle, r"as a pickle \(pytorch_model.bin\), .* make one with transformers"),
    "a shard elsewhere": (outside, "is no .safetensors file beside it"),
    "a lost shard": (lost_shard, "cannot read weights from .*00001-of-00001"),
    "a cut file": (truncate, "cannot read weights from"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_cannot_be_read_is_refused_with_the_reason(theirs, tmp_path, case):
    damage, message = BAD_FOLDERS[case]
    folder = shutil.copytree(theirs[0], tmp_path / "theirs")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        import_main(["--from", str(folder), "--to", str(tmp_path / "ours")])
    assert not any(name.startswith((".tmp", "ours")) for name in names_in(tmp_path))


def test_gpt2_options_that_change_the_mathematics_are_refused(tmp_path, theirs):
    folder = shutil.copytree(theirs[0], tmp_path / "theirs")
    rewrite(folder, model_type="gpt2", architectures=None, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(CheckpointError, match="scale_attn_by_inverse_layer_idx is 'True'"):
        import_main(["--from", str(folder), "--to", str(tmp_path / "ours")])


def test_a_tokenizer_that_is_missing_or_too_large_is_one_sentence(theirs, tmp_path):
    folder = shutil.copytree(theirs[0], tmp_path / "theirs")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    arguments = ["--from", str(folder), "--to", str(tmp_path / "ours")]
    with pytest.raises(ConfigError, match="--tokenizer PATH"):
        import_main(arguments)
    n = len(tokenizer["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": n, "content": "<|one more|>", **flags}]
    (tmp_path / "larger.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="give the one it was trained with"):
        import_main([*arguments, "--tokenizer", str(tmp_path / "larger.json")])


def test_a_place_with_nothing_to_read_and_one_that_is_taken(tmp_path):
    with pytest.raises(CheckpointError, match="is neither a folder of Hugging Face's"):
        import_main(["--from", str(tmp_path), "--to", str(tmp_path / "ours")])
    with pytest.raises(CheckpointError, match="does not exist"):
        import_main(["--from", str(tmp_path / "nothing"), "--to", str(tmp_path / "ours")])
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="as a pickle"):
        import_main(["--from", str(tmp_path / "w.pt"), "--to", str(tmp_path / "ours")])
    with pytest.raises(ConfigError, match="exists already"):
        import_main(["--from", str(tmp_path), "--to", str(tmp_path)])
    (tmp_path / "run" / "checkpoints" / "global_step5").mkdir(parents=True)
    with pytest.raises(ConfigError, match="run is a model of MegaGPT's already"):
        import_main(["--from", str(tmp_path / "run"), "--to", str(tmp_path / "new")])


def openai_files(folder, source):
    """What OpenAI released of GPT-1, of another model: three files cut where it happens to be."""
    folder.mkdir()
    state = load_file(source)
    there = as_transformers(Tensors.of(state), open_source(source).config).all()
    there = {name.removeprefix("transformer."): x.numpy() for name, x in there.items()}
    names = ["positions_embed.weight", "tokens_embed.weight"]
    names += [f"h.{i}.{part}.{kind}" for i in range(2) for part in BLOCK for kind in ("weight", "bias")]
    arrays = [there[name] for name in names]
    shapes = [list(x.shape) if i < 2 or x.ndim == 1 else [1, *x.shape] for i, x in enumerate(arrays)]
    (folder / "params_shapes.json").write_text(json.dumps(shapes))
    flat = np.concatenate([x.reshape(-1) for x in arrays])
    for i, part in enumerate(np.array_split(flat, 3)):
        np.save(folder / f"params_{i}.npy", part)
    model = json.loads(source.with_name("tokenizer.json").read_text())["model"]
    (folder / "encoder_bpe_40000.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "vocab_40000.bpe").write_text(f"#version: 0.2\n{merges}\n")
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Files in OpenAI's form and the model they are of."""
    home = tmp_path_factory.mktemp("openai")
    source = saved(home / "ours", "post")
    return openai_files(home / "files", source), source


def test_openai_s_files_are_the_model_they_were_made_of(released, tmp_path):
    files, source = released
    found, expected = imported(files, tmp_path / "ours", "--n_head", 2), load_file(source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ours = open_source(tmp_path / "ours")
    assert ours.config == open_source(source).config
    assert [ours.tokenizer.encode(t) for t in PARAGRAPHS] == [
        open_source(source).tokenizer.encode(t) for t in PARAGRAPHS
    ]


def reshape(files, change):
    shapes = json.loads((files / "params_shapes.json").read_text())
    change(shapes)
    (files / "params_shapes.json").write_text(json.dumps(shapes))


def cut_file(files):
    path = files / "params_1.npy"
    path.write_bytes(path.read_bytes()[:-4])


BAD_FILES = {
    "a lost file": (lambda f: (f / "params_1.npy").unlink(), r"lacks params_1\.npy"),
    "a cut file": (cut_file, r"params_1\.npy cannot be read"),
    "a pickle in a file": (
        lambda f: np.save(f / "params_0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True),
        r"params_0\.npy cannot be read",
    ),
    "doubles": (lambda f: np.save(f / "params_0.npy", np.zeros(3)), "is no vector of float32"),
    "too few numbers": (lambda f: np.save(f / "params_2.npy", np.zeros(3, np.float32)), "asks for .* hold"),
    "a shape too few": (lambda f: reshape(f, lambda s: s.pop()), "asks for"),
    "shapes that are none": (lambda f: reshape(f, lambda s: s.append([0])), "is no list of shapes"),
    "no JSON": (lambda f: (f / "params_shapes.json").write_text("["), "cannot be read"),
    "turned": (lambda f: reshape(f, lambda s: s[2].reverse()), "is no GPT-1"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_openai_s_files_that_do_not_fit_together_are_refused(released, tmp_path, case):
    damage, message = BAD_FILES[case]
    files = shutil.copytree(released[0], tmp_path / "files")
    damage(files)
    with pytest.raises(CheckpointError, match=message):
        import_main(["--from", str(files), "--to", str(tmp_path / "ours"), "--n_head", "2"])
    with pytest.raises(CheckpointError, match="must be a multiple of n_head=5"):
        import_main(["--from", str(released[0]), "--to", str(tmp_path / "ours"), "--n_head", "5"])
