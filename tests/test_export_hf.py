"""Models written for transformers and read back: every bit, the same logits, the same text."""

import json
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from data_common import PARAGRAPHS
from export_common import names_in, saved, tokenizer_of
from safetensors.torch import load_file, save_file

from megagpt.config.presets import model_preset
from megagpt.data.tokenizer import from_file
from megagpt.errors import CheckpointError, ConfigError, DataError
from megagpt.evaluate.main import generate_main
from megagpt.evaluate.source import open_source
from megagpt.export.importing import import_main
from megagpt.export.main import export_main
from megagpt.export.shards import parse_size, write_shards
from megagpt.model.generate import generate
from megagpt.model.interop import as_transformers
from megagpt.train import weights

NORMS = pytest.mark.parametrize("norm", ["pre", "post"])


def exported(source: Path, to: Path, *more) -> Path:
    assert export_main(["--from", str(source), "--to", str(to), *map(str, more)]) == 0
    return to


@pytest.fixture(scope="module", params=["pre", "post"])
def pair(request, tmp_path_factory):
    """A saved model and its folder for transformers."""
    home = tmp_path_factory.mktemp(request.param)
    source = saved(home / "ours", request.param)
    return source, exported(source, home / "theirs")


def test_there_and_back_every_bit_and_the_tokenizer_are_the_same(pair, tmp_path):
    source, folder = pair
    assert import_main(["--from", str(folder), "--to", str(tmp_path / "back")]) == 0
    assert names_in(tmp_path / "back") == ["model.safetensors", "tokenizer.json"]
    before, after = load_file(source), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert open_source(tmp_path / "back").config == open_source(source).config
    assert open_source(tmp_path / "back").tokenizer.sha256 == open_source(source).tokenizer.sha256


def test_the_folder_has_what_the_field_expects_and_the_card_the_largest_difference(pair):
    _, folder = pair
    assert names_in(folder) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    found = re.search(r"\*\*(\d\.\de-\d+)\*\*", (folder / "README.md").read_text())
    assert 0 < float(found[1]) < 1e-4


def test_transformers_gives_the_same_ids_and_writes_the_same_text(pair, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = pair
    ours, tokenizer = open_source(source).build("cpu"), open_source(source).tokenizer
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert [their_tokenizer(text)["input_ids"] for text in PARAGRAPHS] == [tokenizer.encode(t) for t in PARAGRAPHS]
    ids, seen = tokenizer.encode(PARAGRAPHS[0]), set()
    for end in range(4, 20, 3):
        prompt = ids[:end]
        expected = generate(ours, prompt, max_new_tokens=20, temperature=0.0)
        rules = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        new = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, **rules)
        assert new[0, end:].tolist() == expected
        seen.update(expected)
    assert len(seen) > 5
    arguments = ["--prompt", "The cat's whiskers", "--max_tokens", "20", "--temperature", "0"]
    texts = []
    for place in (source, folder):
        assert generate_main(["--from", str(place), *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_sharded_weights_are_the_same_and_are_read_back(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    source, whole = pair
    folder = exported(source, tmp_path / "shards", "--max_shard_size", "20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["metadata"]["total_size"] == sum(
        4 * x.numel() for x in load_file(whole / "model.safetensors").values()
    )
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(state[n], x) for n, x in load_file(whole / "model.safetensors").items())
    assert import_main(["--from", str(folder), "--to", str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], x) for name, x in load_file(source).items())


@pytest.mark.parametrize("preset", ["gpt1", "gpt2-small"])
def test_at_full_size_the_logits_are_those_of_transformers(preset, tmp_path, capsys):
    """117 and 124 million random weights; export itself compares the logits and fails above 1e-4."""
    shape = model_preset(preset)
    source = saved(tmp_path / "ours", shape.pop("norm"), std=0.02, **shape)
    exported(source, tmp_path / "theirs")
    difference = float(re.search(r"transformers [\d.]+: (\S+)", capsys.readouterr().out)[1])
    assert 0 < difference < 1e-4


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_in_16_bits_the_weights_are_rounded_once_and_checked_as_they_are(pair, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    source, whole = pair
    folder = exported(source, tmp_path / "half", "--dtype", dtype, "--max_shard_size", "40KB")
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    rounded = {name: x.to(wanted) for name, x in load_file(whole / "model.safetensors").items()}
    shards = [load_file(path) for path in folder.glob("model-*.safetensors")]
    assert all(sum(x.numel() for x in shard.values()) <= 20_000 for shard in shards)
    written = {name: x for shard in shards for name, x in shard.items()}
    assert written.keys() == rounded.keys()
    assert all(x.dtype == wanted and torch.equal(x, rounded[name]) for name, x in written.items())
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == wanted
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * x.numel() for x in rounded.values())
    card = (folder / "README.md").read_text()
    assert f"| weights | {str(wanted).removeprefix('torch.')}, rounded from float32 |" in card
    assert 0 < float(re.search(r"\*\*(\d\.\de-\d+)\*\*", card)[1]) < 1e-4
    back = open_source(folder).build("cpu").state_dict()
    assert all(torch.equal(back[name], x.to(wanted).float()) for name, x in load_file(source).items())


def test_numbers_beyond_16_bits_are_told_with_their_tensor(tmp_path):
    source = saved(tmp_path / "ours", "pre")
    state, about = load_file(source), {"config": json.dumps(open_source(source).config.to_dict())}
    state["blocks.1.mlp.fc.bias"][3] = 70_000.0
    save_file(state, source, metadata=about)
    with pytest.raises(
        CheckpointError, match=r"h\.1\.mlp\.c_fc\.bias holds numbers up to 7e\+04, beyond the range of fp16"
    ):
        exported(source, tmp_path / "theirs", "--dtype", "fp16")
    assert names_in(tmp_path) == ["ours"]


def test_what_differs_in_transformers_is_not_kept(tmp_path):
    source = saved(tmp_path / "ours", "pre")
    state, about = load_file(source), {"config": json.dumps(open_source(source).config.to_dict())}
    state["blocks.1.mlp.fc.bias"][3] = torch.nan
    save_file(state, source, metadata=about)
    with pytest.raises(CheckpointError, match="differ by up to nan"):
        exported(source, tmp_path / "theirs")
    assert names_in(tmp_path) == ["ours"]


def test_without_transformers_the_card_says_that_nothing_was_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)  # what an import finds where it is not installed
    folder = exported(saved(tmp_path / "ours", "pre"), tmp_path / "theirs")
    assert "not checked: transformers is not installed" in capsys.readouterr().out
    assert "Not checked against transformers" in (folder / "README.md").read_text()


def test_what_cannot_be_exported_is_said_before_anything_is_written(tmp_path):
    source = saved(tmp_path / "ours", "post", d_ff=100, vocab_size=300)
    cases = [
        (["--to", tmp_path / "ours"], ConfigError, "exists already"),
        (["--to", tmp_path / "new"], CheckpointError, "4 x 32 = 128 units and this model of 100"),
        (["--to", tmp_path / "new", "--max_shard_size", "many"], ConfigError, "give one such as 5GB"),
    ]
    tokenizer_of("pre").save(tmp_path / "ours" / "other.json")
    cases.append(
        (["--to", tmp_path / "new", "--tokenizer", tmp_path / "ours" / "other.json"], DataError, "another one")
    )
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            export_main(["--from", str(source), *map(str, arguments)])
    assert names_in(tmp_path) == ["ours"]
    with pytest.raises(CheckpointError, match="does not exist"):
        export_main(["--from", str(tmp_path / "nothing"), "--to", str(tmp_path / "new")])


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 1_572_864), ("200kb", 200_000), ("7B", 7)], ids=str
)
def test_sizes(text, size):
    assert parse_size(text) == size


def parts_on_disk(folder: Path, state: dict, stage: int, n_ranks: int) -> None:
    """``state`` as DeepSpeed's ZeRO keeps it: stage 2 cuts the whole vector, stage 3 every parameter."""
    folder.mkdir()
    flat = {name: x.flatten() for name, x in state.items()}
    if stage == 3:
        padded = [torch.cat([x, x.new_zeros(-len(x) % n_ranks)]).view(n_ranks, -1) for x in flat.values()]
        parts = [torch.cat([x[rank] for x in padded]) for rank in range(n_ranks)]
    else:
        whole = torch.cat(list(flat.values()))
        parts = list(torch.cat([whole, whole.new_zeros(-len(whole) % n_ranks)]).view(n_ranks, -1))
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank, part in enumerate(parts):
        shard = {key: [part.clone().requires_grad_()], "partition_count": n_ranks}  # as DeepSpeed saves them
        torch.save({"optimizer_state_dict": shard}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    shapes = [{name: x.shape for name, x in state.items()}]
    torch.save({"param_shapes": shapes}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")


@pytest.mark.parametrize("stage", [2, 3])
def test_parts_of_eleven_ranks_are_put_together_in_little_memory(stage, tmp_path):
    """Ranks are ordered by number and not by name, parts end within parameters, and one tensor is whole at a time."""
    source = saved(tmp_path / "ours", "pre", vocab_size=5_001, n_layer=8, d_model=256)
    state = load_file(source)
    config = open_source(source).config
    parts_on_disk(tmp_path / "zero", state, stage, 11)
    largest, n_bytes = max(4 * x.numel() for x in state.values()), sum(4 * x.numel() for x in state.values())
    tensors = as_transformers(weights._sharded(tmp_path / "zero", stage), config)
    (tmp_path / "out").mkdir()
    peak = anonymous_peak(lambda: write_shards(tmp_path / "out", tensors, 10**7))
    assert peak < 2.5 * largest < 0.5 * n_bytes, (peak, largest, n_bytes)
    written = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        written |= load_file(path)
    expected = as_transformers(weights.Tensors.of(state), config).all()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], x) for name, x in expected.items())


def anonymous_peak(work) -> int:
    """Bytes by which the memory that is no mapped file grows while ``work`` runs."""

    def anonymous() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    most, done, before = [0], threading.Event(), anonymous()

    def watch() -> None:
        while not done.wait(0.0005):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    assert most[0], "nothing was measured"
    return most[0] - before


def test_a_folder_for_transformers_is_not_exported_again(pair, tmp_path):
    with pytest.raises(ConfigError, match="in Hugging Face's form already"):
        export_main(["--from", str(pair[1]), "--to", str(tmp_path / "new")])


def test_an_exported_tokenizer_is_a_tokenizer_of_corpora_too(pair):
    source, folder = pair
    assert from_file(folder / "tokenizer.json").sha256 == open_source(source).tokenizer.sha256
