"""``megagpt evaluate``: perplexities as a plain computation gives them, on any number of ranks, and tasks."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file, save_file
from test_evaluate_generate import byte_tokenizer

from megagpt import dist
from megagpt.data.main import prepare_main
from megagpt.errors import ConfigError, DataError, NumericError
from megagpt.evaluate import progress
from megagpt.evaluate.main import generate_main
from megagpt.evaluate.measure import EvaluateSettings, evaluate_main, ranks
from megagpt.evaluate.scores import score
from megagpt.evaluate.source import open_source
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops

TEXT = "It was a dark night.\nThe wind über the rain did not rest.\n" * 2
C = 16  # the context


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a model of random weights, its tokenizer, and a text; the weights' path."""
    folder = tmp_path_factory.mktemp("run")
    config = GPTConfig(vocab_size=257, seq_len=C, n_layer=2, n_head=2, d_model=16)
    torch.manual_seed(0)
    model = GPT(config, load_ops("torch", head_width=8, dtype=torch.float32, device="cpu"))
    weights = {name: x.detach() + 0.2 * torch.randn_like(x) for name, x in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"config": json.dumps(config.to_dict())})
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (folder / "text.txt").write_text(TEXT)
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def model(run):
    return open_source(run).build("cpu")


def log_prob(model, ids, token):
    """log P(token | ids), computed alone."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].double().log_softmax(0)[token].item()


def plain_loss(model, ids, stride):
    """The mean over all tokens but the first, each from what its window holds before it, one at a time."""
    losses, begin = [], 0
    for at in range(1, len(ids)):
        while at > begin + C:
            begin += stride
        losses.append(-log_prob(model, ids[begin:at], ids[at]))
    return sum(losses) / len(losses)


def measured(*arguments, output):
    assert evaluate_main([*map(str, arguments), "--json", str(output)]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("stride", [None, 5, 1, C])
def test_the_measures_of_a_text_are_those_of_a_plain_computation(run, model, tmp_path, stride):
    flags = [] if stride is None else ["--stride", stride]
    found = measured("--from", run, "--data", run.with_name("text.txt"), *flags, output=tmp_path / "out.json")
    found = found["data"]["text.txt"]
    ids = [*open_source(run).tokenizer.encode(TEXT), 256]  # a document ends with the end of text
    loss = plain_loss(model, ids, stride or C)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(loss), rel=1e-4)
    nats = loss * (len(ids) - 1)
    assert found["word_ppl"] == pytest.approx(math.exp(nats / len(TEXT.split())), rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert found["tokens"] == len(ids)


def test_a_text_and_the_corpus_made_of_it_measure_the_same(run, tmp_path, capsys):
    tokenizer = run.with_name("tokenizer.json")
    arguments = ["--input", run.with_name("text.txt"), "--tokenizer", tokenizer, "--output", tmp_path / "corpus"]
    assert prepare_main([str(a) for a in arguments]) == 0
    sets = ["--data", run.with_name("text.txt"), f"made={tmp_path / 'corpus'}"]
    found = measured("--from", run, *sets, output=tmp_path / "out.json")["data"]
    assert found["text.txt"] == found["made"]
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split()[:2] == ["set", "perplexity"]
    assert [line.split()[0] for line in table[1:]] == ["text.txt", "made"]
    assert f"{found['made']['ppl']:,.4f}" in table[2]
    part = measured("--from", run, *sets[:2], "--max_windows", 2, output=tmp_path / "out.json")["data"]["text.txt"]
    assert (part["windows"], found["made"]["windows"] > 2) == (2, True)  # those that were computed


def test_a_figure_too_large_for_a_number_is_null_in_json_and_not_what_json_does_not_know(run, tmp_path, capsys):
    """The perplexity of a word of 2,000 letters stood there as Infinity, which most readers of JSON refuse."""
    (tmp_path / "long.txt").write_text("x" * 2000)
    flags = ["--from", run, "--data", tmp_path / "long.txt", "--json", tmp_path / "out.json"]
    assert evaluate_main([*map(str, flags)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[2] == "inf"
    found = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)["data"]["long.txt"]
    assert found["word_ppl"] is None
    assert found["ppl"] > 1


def test_a_long_computation_tells_how_far_it_is_and_a_short_one_nothing(run, tmp_path, capsys, monkeypatch):
    flags = ["--from", run, "--data", run.with_name("text.txt"), "--batch_size", 2]
    assert evaluate_main([*map(str, flags)]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    assert evaluate_main([*map(str, flags)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"text.txt: 2 of 8 windows \| eta: 0:0\d:\d\d", told[0]), told
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' * 3)
    flags = ["--from", run, "--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--max_tokens", 2]
    assert generate_main([*map(str, flags)]) == 0
    assert f"{tmp_path / 'out.jsonl'}: 1 of 3 answers" in capsys.readouterr().err


def test_a_model_of_broken_numbers_has_no_perplexity(run, tmp_path):
    """It was nan, with the exit code of success."""
    weights = load_file(run)
    weights["ln_f.weight"][0] = math.nan
    about = {"config": json.dumps(open_source(run).config.to_dict())}
    save_file(weights, tmp_path / "model.safetensors", metadata=about)
    flags = ["--from", tmp_path / "model.safetensors", "--tokenizer", run.with_name("tokenizer.json")]
    with pytest.raises(NumericError, match=r"the loss over text\.txt is not finite"):
        evaluate_main([*map(str, flags), "--data", str(run.with_name("text.txt"))])


def _settled(run) -> tuple[str, int, str]:
    source = open_source(run)
    if not dist.is_main():  # it sees another state of a run that goes on, and is not asked
        source = replace(source, find=lambda: run / "checkpoints" / "global_step4")
    with ranks():
        source = source.settled()
    return source.checkpoint, source.step, sorted(source.weights().shapes)[0]


def test_all_ranks_take_the_checkpoint_that_the_first_one_finds(run_dir):
    """Each looked for itself, and a run that saved meanwhile gave them different ones."""
    (run_dir / "checkpoints" / "global_step4" / "manifest.json").unlink()
    results = run_ranks(_settled, 2, run_dir)
    assert [found for found, _ in results] == [("global_step3", 3, "blocks.0.attn.proj.bias")] * 2
    assert "warning: skipped checkpoint global_step4: it has no manifest.json" in results[0][1]
    assert "warning" not in results[1][1]


def _on_this_rank(run, output, tasks):
    flags = ["--from", run, "--data", run.with_name("text.txt"), "--stride", "3", "--batch_size", "2", "--json", output]
    return evaluate_main([*map(str, flags), *(["--tasks", *tasks] if tasks else [])])


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Three tasks over local files; none where the harness is not installed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return []
    return [str(path) for path in write_tasks(tmp_path)]


QUESTIONS = [
    {"question": "The night was", "choices": ["dark", "a wind"], "label": 0},
    {"question": "It", "choices": ["rained", "is", "was a dark night and the rain did not rest"], "label": 2},
    {"question": "A", "choices": ["b", "c", "d"], "label": 1},
]


def write_tasks(folder):
    (folder / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    common = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "questions.json"}
test_split: test
"""
    choice = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
"""
    rolling = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{choices[0]}} {{question}} and then nothing"
metric_list:
  - metric: bits_per_byte
"""
    written = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "nothing"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 5
metric_list:
  - metric: exact_match
"""
    for name, body in {"choice": choice, "rolling": rolling, "written": written}.items():
        path = folder / f"{name}.yaml"
        path.write_text(f"task: local_{name}\n{common}{body}")
        yield path


def test_two_ranks_measure_what_one_does_to_the_last_digit(run, tmp_path, tasks):
    """Texts and, where the harness is installed, tasks."""
    assert _on_this_rank(run, tmp_path / "one.json", tasks) == 0
    results = run_ranks(_on_this_rank, 2, run, tmp_path / "two.json", tasks, timeout=240)
    assert [code for code, _ in results] == [0, 0]
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
    assert "text.txt" in results[0][1]
    assert "text.txt" not in results[1][1]


def test_tasks_whose_data_are_not_there_are_told_without_a_traceback(run, tmp_path, tasks):
    if not tasks:
        pytest.skip("lm-evaluation-harness is not installed: pip install 'megagpt[eval]'")
    (tmp_path / "questions.json").unlink()
    with pytest.raises(DataError, match=r"--tasks local_choice cannot be loaded \(\w+: .*; their data are downloaded"):
        evaluate_main(["--from", str(run), "--tasks", tasks[0]])


def test_tasks_of_the_harness_get_the_scores_that_are_worked_out_by_hand(run, model, tmp_path, tasks):
    if not tasks:
        pytest.skip("lm-evaluation-harness is not installed: pip install 'megagpt[eval]'")
    found = measured("--from", run, "--tasks", *tasks, output=tmp_path / "out.json")["tasks"]
    tokenizer = open_source(run).tokenizer
    right, bits = 0, []
    for q in QUESTIONS:
        sums = [by_hand(model, tokenizer, q["question"], f" {answer}") for answer in q["choices"]]
        right += sums.index(max(sums)) == q["label"]
        text = f"{q['choices'][0]} {q['question']} and then nothing"
        bits.append((windows_by_hand(model, [256, *tokenizer.encode(text)]), len(text.encode())))
    assert found["local_choice"]["acc"] == pytest.approx(right / len(QUESTIONS))
    nats, n_bytes = map(sum, zip(*bits, strict=True))
    assert found["local_rolling"]["bits_per_byte"] == pytest.approx(-nats / math.log(2) / n_bytes, rel=1e-5)
    assert found["local_written"]["exact_match"] == 0


def by_hand(model, tokenizer, context, answer):
    ids, new = tokenizer.encode(context), tokenizer.encode(answer)
    both = [*ids, *new][-C - 1 :]
    return sum(log_prob(model, both[:at], both[at]) for at in range(max(1, len(both) - len(new)), len(both)))


def windows_by_hand(model, ids):
    return sum(log_prob(model, ids[(at - 1) // C * C : at], ids[at]) for at in range(1, len(ids)))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_scores_are_the_log_probabilities_of_the_tokens_whatever_the_batch(model, batch_size):
    sequences = [([1, 2, 3, 4], 2), ([5, 6], 1), (list(range(16)), 15), (list(range(30)), 27), ([7] * 9, 1)]
    found = score(model, sequences, batch_size=batch_size)
    for (ids, first), scored in zip(sequences, found, strict=True):
        begin = max(0, len(ids) - C - 1)
        expected = [log_prob(model, ids[begin:at], ids[at]) for at in range(first, len(ids))]
        assert scored.log_probs == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        likeliest = int(model(torch.tensor([[1, 2]]))[0, -1].argmax())
    assert [s.greedy for s in score(model, [([1, 2, likeliest], 2), ([1, 2, 0], 2)], batch_size=2)] == [
        True,
        likeliest == 0,
    ]


BAD = {
    "nothing": ([], ConfigError, "needs --data or --tasks"),
    "stride 0": (["--data", "x", "--stride", "0"], ConfigError, "--stride 0 must be at least 1"),
    "stride": (["--data", "x", "--stride", "17"], ConfigError, "leaves out tokens: the context is 16"),
    "missing": (["--data", "nowhere"], DataError, "nowhere does not exist"),
    "twice": (["--data", "a/x", "b/x"], ConfigError, "two sets 'x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_measured_is_told(run, case):
    flags, error, message = BAD[case]
    with pytest.raises(error, match=message):
        evaluate_main(["--from", str(run), *flags])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt cannot be measured as it is: .*the file is empty"),
        ("a.csv", "words\nx\n", r"has no column 'text'.*give it to megagpt prepare"),
    ],
    ids=["empty", "a table"],
)
def test_a_text_that_cannot_be_read_names_no_flag_of_another_command(run, tmp_path, name, content, message):
    """It said to choose one with --column, which evaluate does not have."""
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        evaluate_main(["--from", str(run), "--data", str(tmp_path / name)])
    assert "--input" not in str(caught.value)


def test_a_corpus_of_another_tokenizer_is_refused(run, tokenizer, tmp_path):
    arguments = ["--input", run.with_name("text.txt"), "--tokenizer", tokenizer, "--output", tmp_path / "other"]
    assert prepare_main([str(a) for a in arguments]) == 0
    with pytest.raises(DataError, match="another tokenizer than the model's"):
        evaluate_main(["--from", str(run), "--data", str(tmp_path / "other")])


def test_settings_name_sets_by_the_end_of_their_path():
    assert EvaluateSettings("run", data=("data/books-valid", "b=x/y.txt")).sets() == {
        "books-valid": "data/books-valid",
        "b": "x/y.txt",
    }
