"""What GPUs and networks can do, for ``megagpt plan``: figures with a source, in bytes, FLOP/s and seconds."""

from dataclasses import dataclass, replace

from megagpt.errors import ConfigError, nearest

# Of the links' speed in one direction that a ring of NCCL reaches: 367.6 of 450 GB/s on eight H200 with NVLink, 16 GiB,
# stas00/ml-engineering network/benchmarks/results/all-reduce-8xH200.md. Assumed for networks and PCIe as well.
LINK_SHARE = 0.82
# Time of a collective that does not depend on its size: 40 us on that node and 69 us on four nodes, both from the rows
# of 32 KiB (stas00/ml-engineering network/benchmarks/README.md).
LATENCY, NETWORK_LATENCY = 40e-6, 70e-6
# Of the memory's speed that element-wise kernels and optimisers reach: 2.9 of 3.35 TB/s in a copy on H100
# (aigatech/vpbenchmarking), and less in kernels that also reduce; assumed.
MEMORY_SHARE = 0.75


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links. Figures of the maker's data sheets; those that quote sparsity are halved."""

    memory: float  # bytes; below what the driver reports, for makers count in 2^30
    peak: float  # dense FLOP/s in 16 bit
    peak_fp32: float  # FLOP/s in float32, without tensor cores, as torch multiplies unless TF32 is switched on
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s in one direction to the other GPUs of a node
    network: float | None  # bytes/s in one direction of the adapters of the maker's DGX together; None: there is none
    host: float  # bytes/s in one direction to CPU memory
    product_share: float  # of the peak that matrix products reach within a training step
    bf16: bool = True

    def peak_in(self, precision: str) -> float:
        """FLOP/s in fp32, bf16 or fp16."""
        return self.peak_fp32 if precision == "fp32" else self.peak


# Of a step's matrix products. Both are fitted to the published rows of docs/plan.md; the products alone reach 0.80 and
# 0.87 of the peak (stas00/ml-engineering compute/accelerator, "Maximum Achievable Matmul FLOPS").
_HOPPER, _AMPERE = 0.50, 0.64
_TB, _GB, _GBIT = 1e12, 1e9, 1e9 / 8
_PCIE_4 = 32 * _GB  # of 16 lanes, for a GPU of which nothing is said

GPUS = {
    #                  GB     FLOP/s    fp32      memory       to GPUs     network      to CPU
    "b200-180gb": Gpu(180e9, 2250e12, 75e12, 8.0 * _TB, 900 * _GB, 3200 * _GBIT, 64 * _GB, _HOPPER),
    "h200-141gb": Gpu(141e9, 989.4e12, 67e12, 4.8 * _TB, 450 * _GB, 3200 * _GBIT, 64 * _GB, _HOPPER),
    "gh200-96gb": Gpu(96e9, 989.4e12, 67e12, 4.0 * _TB, 450 * _GB, None, 450 * _GB, _HOPPER),
    "h100-80gb": Gpu(80e9, 989.4e12, 67e12, 3.35 * _TB, 450 * _GB, 3200 * _GBIT, 64 * _GB, _HOPPER),
    "h100-pcie-80gb": Gpu(80e9, 756e12, 51e12, 2.0 * _TB, 64 * _GB, None, 64 * _GB, _HOPPER),
    "a100-80gb": Gpu(80e9, 312e12, 19.5e12, 2.039 * _TB, 300 * _GB, 1600 * _GBIT, 32 * _GB, _AMPERE),
    "a100-40gb": Gpu(40e9, 312e12, 19.5e12, 1.555 * _TB, 300 * _GB, 1600 * _GBIT, 32 * _GB, _AMPERE),
    "a100-pcie-80gb": Gpu(80e9, 312e12, 19.5e12, 1.935 * _TB, 32 * _GB, None, 32 * _GB, _AMPERE),
    "l40s-48gb": Gpu(48e9, 362e12, 91.6e12, 0.864 * _TB, 32 * _GB, None, 32 * _GB, _HOPPER),
    "l4-24gb": Gpu(24e9, 121e12, 30.3e12, 0.3 * _TB, 32 * _GB, None, 32 * _GB, _HOPPER),
    "a40-48gb": Gpu(48e9, 149.7e12, 37.4e12, 0.696 * _TB, 32 * _GB, None, 32 * _GB, _AMPERE),
    "a10-24gb": Gpu(24e9, 125e12, 31.2e12, 0.6 * _TB, 32 * _GB, None, 32 * _GB, _AMPERE),
    "rtx4090-24gb": Gpu(24e9, 165.2e12, 82.6e12, 1.008 * _TB, 32 * _GB, None, 32 * _GB, _HOPPER),
    "rtx3090-24gb": Gpu(24e9, 71e12, 35.6e12, 0.936 * _TB, 32 * _GB, None, 32 * _GB, _AMPERE),
    "v100-32gb": Gpu(32e9, 125e12, 15.7e12, 0.9 * _TB, 150 * _GB, 400 * _GBIT, 16 * _GB, _AMPERE, bf16=False),
    "v100-16gb": Gpu(16e9, 125e12, 15.7e12, 0.9 * _TB, 150 * _GB, 400 * _GBIT, 16 * _GB, _AMPERE, bf16=False),
    "t4-16gb": Gpu(16e9, 65e12, 8.1e12, 0.3 * _TB, 16 * _GB, None, 16 * _GB, _AMPERE, bf16=False),
}
_NEEDED = {"gpu_memory_gb": "memory", "gpu_tflops": "peak", "gpu_bandwidth_gbs": "bandwidth"}


def find_gpu(name: str, **numbers: float | None) -> Gpu:
    """The GPU ``name`` of the table with the ``numbers`` that are given in its place.

    ``numbers``: gpu_memory_gb, gpu_tflops (dense, in the precision planned), gpu_bandwidth_gbs, link_gbs, network_gbit
    (a node's) and host_gbs, all in the units of data sheets. Raises ConfigError for a name that is not in the table
    unless the first three are given.
    """
    known = GPUS.get(name.lower())
    given = {flag: value for flag, value in numbers.items() if value is not None}
    if known is None:
        missing = [f"--{flag}" for flag in _NEEDED if flag not in given]
        if missing:
            raise ConfigError(
                f"--gpu {name[:40]} is unknown{nearest(name.lower(), GPUS)}; choose one of {', '.join(GPUS)}, or give "
                f"its figures: {', '.join(missing)}"
            )
        known = Gpu(0.0, 0.0, 0.0, 0.0, _PCIE_4, None, _PCIE_4, _HOPPER)
    units = {
        "gpu_memory_gb": ("memory", _GB),
        "gpu_tflops": ("peak", 1e12),
        "gpu_bandwidth_gbs": ("bandwidth", _GB),
        "link_gbs": ("link", _GB),
        "network_gbit": ("network", _GBIT),
        "host_gbs": ("host", _GB),
    }
    changes = {units[flag][0]: value * units[flag][1] for flag, value in given.items()}
    if "peak" in changes:
        changes["peak_fp32"] = changes["peak"]
    return replace(known, **changes)


def bus_bandwidth(gpu: Gpu, nodes: int) -> float:
    """Bytes/s at which a ring over all GPUs moves what each of them sends.

    NCCL lays as many rings as there are adapters, and each crosses from node to node once: the slower of the links
    within a node and of the node's adapters together governs.
    """
    return LINK_SHARE * (gpu.link if nodes == 1 else min(gpu.link, gpu.network or gpu.link))
