"""Which of a shell's variables the ranks get: a list, and not whatever the shell happened to have.

The batch scripts have the same list (slurm/common.sh); there Slurm's own variables come with it.
"""

import os
from collections.abc import Mapping

MORE = "MEGAGPT_EXPORT"  # names of more, separated by spaces: "WANDB_API_KEY HF_HOME"
_NAMES = {
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "TERM"),
    *("LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "CC", "CXX"),
    *("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "PYTHONDONTWRITEBYTECODE", "PYTHONWARNINGS"),
    *("DS_ACCELERATOR", "TOKENIZERS_PARALLELISM", "MAX_JOBS"),
}
_PREFIXES = ("LC_", "OMP_", "MKL_", "KMP_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "FI_")
_PREFIXES += ("TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "XDG_", "SLURM_", "MEGAGPT_")


def for_ranks(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of ``env`` that a rank gets."""
    names = {*_NAMES, *env.get(MORE, "").split()}
    return {name: value for name, value in env.items() if name in names or name.startswith(_PREFIXES)}
