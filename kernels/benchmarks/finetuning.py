"""One step of fine-tuning in both forms that cpu_finetune.py times: finetune.py's loop, and transformers' Trainer."""

import csv
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "tests"))

from megagpt import dist  # noqa: E402
from megagpt.config import deepspeed  # noqa: E402
from megagpt.finetune import driver, weights  # noqa: E402
from megagpt.finetune.batches import collate  # noqa: E402
from megagpt.finetune.fields import FinetuneSettings  # noqa: E402
from megagpt.finetune.plan import FinetunePlan, make_plan  # noqa: E402

N_TEXTS, LABELS = 6_000, ("no", "yes")
WARM_UP = 2  # steps that set things up


def make(shape, folder: Path, name: str, **settings) -> FinetunePlan:
    """The plan of a run on made-up texts; both processes make the same one."""
    from finetune_common import pretrained

    home = folder / name
    home.mkdir()
    rng = np.random.default_rng(0)
    words = np.array(["the", "time", "of", "man", "is", "his", "own", "and", "no", "other", "day", "will", "do", "it"])
    for split, n in (("train", N_TEXTS), ("valid", 8)):
        with (home / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for i in range(n):
                rows.writerow([" ".join(rng.choice(words, rng.integers(*shape.words))), LABELS[i % 2]])
    sizes = {"n_layer": shape.n_layer, "d_model": shape.d_model, "n_head": shape.n_head}
    flags = FinetuneSettings(
        ds_config=str(REPO / "ds_configs" / "cpu.json"),
        init_from=str(pretrained("pre", seq_len=shape.words[1] + 8, **sizes)),
        run_dir=str(home / "run"),
        train=str(home / "train.csv"),
        valid=str(home / "valid.csv"),
        global_batch_size=shape.batch,
        micro_batch_size=shape.batch,
        dropout=0.1,
        **settings,
    )
    return make_plan(flags, deepspeed.load(flags.ds_config), dist.resolve_world({}))


# -- ours


def serve_ours(pipe, shape, folder: Path) -> None:
    """Take steps of finetune.py's loop, without and with the auxiliary language model, when asked to."""
    from contextlib import ExitStack, redirect_stdout

    from cpu_train import time_on_request

    from megagpt.train.engine import stop_distributed
    from megagpt.train.stopping import StopRequests

    sys.stdout.flush()
    with ExitStack() as stack, open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        steps, device = {}, None
        for name, lm_coef in (("megagpt", 0.0), ("megagpt with LM", 0.5)):
            plan = make(shape, folder, name, lm_coef=lm_coef)
            device = device or driver.start(plan, dist.resolve_world({}))
            run = stack.enter_context(driver.opened(plan, dist.resolve_world({}), device, StopRequests()))
            steps[name] = run.open_phase(plan.phases[0], run.first_weights(0))[1].advance
        stack.callback(stop_distributed)
        time_on_request(pipe, steps, shape.steps, warm_up=WARM_UP)


# -- the peer


def serve_trainer(pipe, shape, folder: Path) -> None:
    """The same for transformers' Trainer, which is stopped after every ``shape.steps`` steps until it is asked."""
    from transformers import Trainer, TrainerCallback, TrainingArguments, logging

    logging.set_verbosity_error()
    plan = make(shape, folder, "Trainer", lm_coef=0.0)
    model, collator = peer(plan), _Collator()
    check(plan, model, collator)

    class Turns(TrainerCallback):
        steps, begun = 0, 0.0

        def on_step_end(self, args, state, control, **_) -> None:
            self.steps += 1
            if self.steps == WARM_UP:
                pipe.send((["Trainer"], torch.get_num_threads()))
            elif self.steps < WARM_UP or (self.steps - WARM_UP) % shape.steps:
                return
            else:
                pipe.send((time.perf_counter() - self.begun) / shape.steps)
            control.should_training_stop = pipe.recv() is None
            self.begun = time.perf_counter()

    args = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=shape.batch,
        num_train_epochs=3,
        learning_rate=6.25e-5,
        weight_decay=0.01,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=args, train_dataset=examples(plan), data_collator=collator, callbacks=[Turns()])
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 its log, until this process ends
    trainer.train()


def examples(plan: FinetunePlan) -> list[dict]:
    """The run's training sequences as the Trainer wants them."""
    encoded = plan.splits["train"]
    ids = [units[0].sequences[0].tolist() for units in encoded.units]
    return [{"input_ids": x, "labels": int(y)} for x, y in zip(ids, encoded.targets, strict=True)]


class _Collator:
    """Fills a batch up to its longest text, as DataCollatorWithPadding does, without a tokenizer."""

    def __call__(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        T = max(len(example["input_ids"]) for example in batch)
        ids = torch.zeros(len(batch), T, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (target, real) in enumerate(zip(ids, mask, strict=True)):
            words = torch.tensor(batch[row]["input_ids"])
            target[: len(words)], real[: len(words)] = words, 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([e["labels"] for e in batch])}


def peer(plan: FinetunePlan) -> torch.nn.Module:
    """GPT2ForSequenceClassification with the weights that our run begins with."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from megagpt.model.interop import to_transformers

    ours, c = weights.initial(plan), plan.model
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.seq_len,
        n_embd=c.d_model,
        n_layer=c.n_layer,
        n_head=c.n_head,
        num_labels=len(LABELS),
        pad_token_id=0,  # which no text holds
        attn_implementation="sdpa",
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), None),
    )
    model = GPT2ForSequenceClassification(config)
    decoder = {name.removeprefix("gpt."): x for name, x in ours.items() if name.startswith("gpt.")}
    theirs = to_transformers(decoder, c)
    theirs.pop("lm_head.weight")
    model.load_state_dict({**theirs, "score.weight": ours["head.output.weight"]}, strict=True)
    return model


def check(plan: FinetunePlan, theirs: torch.nn.Module, collator: _Collator) -> None:
    """Raise AssertionError where ours, without the bias that the peer lacks, finds other logits."""
    from megagpt.finetune.model import Classifier
    from megagpt.ops import load_ops

    ops = load_ops("auto", head_width=plan.model.head_width, dtype=torch.float32, device="cpu")
    ours = Classifier(plan.model, plan.spec, ops)
    ours.load_state_dict(weights.initial(plan))
    encoded = plan.splits["train"]
    batch = collate(encoded, range(4), n_real=4, example_weight=0.25, sequence_weight=0.0)
    padded = collator(examples(plan)[:4])
    with torch.no_grad():
        found = ours.eval().logits(batch) - ours.head.output.bias
        expected = theirs.eval()(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    theirs.train()
