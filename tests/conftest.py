"""Kernels run in Triton's interpreter where there is no GPU; fixtures that several test modules share."""

import importlib
import shutil
import signal

import pytest
from hypothesis import settings

# A busy machine is no failure: pytest's own timeout ends what hangs. The same examples at every run: errors in float32
# are compared with torch's, and which of the two is lucky must not change from run to run.
settings.register_profile("megagpt", deadline=None, derandomize=True)
settings.load_profile("megagpt")

# Processes that a script starts in its background ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take a minute and more, the longest first: begun last, one alone would keep a process busy at the end.
LONG = [
    f"test_{name}.py"
    for name in (
        "slurm_runs", "kernels_aot", "train_chaos", "train_launchers", "benchmarks", "readme", "kernels_bench",
        "kernels_model", "finetune_commands", "train_fp16", "train_resume", "finetune_objective", "finetune_kinds",
    )
]  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run every N-th test alone, from the I-th on, counted from 0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long files first, and leave the tests of this shard: several processes share the work, nothing installed."""
    place = {name: at for at, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))
    if config.option.shard:
        i, n = map(int, config.option.shard.split("/"))
        config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % n != i])
        items[:] = items[i::n]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """Without a GPU, set ``TRITON_INTERPRET`` while a module that tests kernels is imported.

    Triton asks for it when a kernel is defined. It is there no longer than that: tests of the other parts, and the
    processes that they start, see the environment as it was.
    """
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(collector, pytest.Module) and collector.path.name.startswith("test_kernels_"):
            import torch

            if not torch.cuda.is_available():
                patch.setenv("TRITON_INTERPRET", "1")
            # Triton imports the one at the first launch, a test perhaps the other: both have to see the variable.
            importlib.import_module("triton.experimental.gluon")
            importlib.import_module("megagpt_kernels")
        return (yield)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels are tested: on the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch allocates without a value is NaN, or the largest integer, so that a lane nobody wrote shows."""
    import torch

    def poisoned(allocate):
        def fill(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            floating = tensor.is_floating_point() or tensor.is_complex()
            return tensor.fill_(torch.nan if floating else torch.iinfo(tensor.dtype).max)

        return fill

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """The path of a small tokenizer that is not trained anew in every test."""
    from data_common import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture
def texts(tmp_path) -> list[str]:
    """The documents of three small files in ``input``."""
    from data_common import write_documents

    return write_documents(tmp_path / "input")


@pytest.fixture
def many(tmp_path) -> list[str]:
    """The paths of two files that take a few seconds to prepare."""
    from data_common import write_many

    return write_many(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a finished run of two ranks; not to be changed."""
    from checkpoint_common import finished_run

    return finished_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of the finished run to damage."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def cluster():
    """A Slurm of two nodes on this machine; a file of tests has its own, whichever process runs it."""
    import slurm_cluster

    if missing := slurm_cluster.missing():
        pytest.skip(f"this machine lacks {', '.join(missing)}; .ci/install-slurm")
    with slurm_cluster.Cluster() as cluster:
        yield cluster
