"""Every shipped DeepSpeed file that a CPU can run trains; for the others the user is told what to use instead."""

import json
from pathlib import Path

import pytest
from corpora import tiny_corpus
from distributed import train

CONFIGS = sorted((Path(__file__).parent.parent / "ds_configs").glob("*.json"))
GPU_ONLY = {  # file: words of the one line that says so
    **{f"zero{stage}_fp16": "fp16 needs a GPU and none is visible" for stage in range(4)},
    "zero3_nvme": "offload to nvme needs a GPU and none is visible",
    "zeropp": "ZeRO++ quantises on GPUs only and none is visible",
}


def arguments(config: Path, run_dir: Path, *more) -> list:
    shape = ["--n_layer", 1, "--d_model", 32, "--n_head", 2, "--seq_len", 16]
    size = ["--micro_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_steps", 2]
    return [
        "--ds_config",
        config,
        "--model",
        "tiny",
        *shape,
        "--data",
        tiny_corpus(),
        "--run_dir",
        run_dir,
        *size,
        *more,
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_shipped_file_trains_two_steps_or_says_what_to_use(config, tmp_path):
    if config.stem == "zeropp":  # it says 8 GPUs a node
        config = tmp_path / "zeropp.json"
        config.write_text(
            (CONFIGS[0].parent / config.name).read_text().replace('partition_size": 8', 'partition_size": 2')
        )
    codes, output = train(arguments(config, tmp_path / "run"), 2)
    if config.stem in GPU_ONLY:
        assert codes == [2, 2]
        assert GPU_ONLY[config.stem] in output
        assert output.count("error:") == 1
        assert not (tmp_path / "run").exists()
        return
    assert codes == [0, 0], output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 2
    assert records[-1]["samples"] == 16
