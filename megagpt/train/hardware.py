"""What a GPU could do at most, for model FLOPs utilisation (MFU).

MFU = tokens/s of a GPU x model FLOPs a token / peak FLOP/s, where the peak is the vendor's dense 16-bit figure with
fp32 accumulation. A device that is not in the table has no MFU: a wrong one would be worse.
"""

import re

# Device names are matched whole, as torch.cuda.get_device_name gives them: a laptop's or a MIG slice's chip has another
# peak. FLOP/s from the vendors' data sheets and white papers; those that quote sparsity are halved.
_BF16_AND_FP16 = (
    (r"NVIDIA GB200", 2500e12),
    (r"NVIDIA B200", 2250e12),
    (r"NVIDIA H200", 989.4e12),
    (r"NVIDIA GH200 .*", 989.4e12),
    (r"NVIDIA H100 (80GB HBM3|SXM.*)", 989.4e12),
    (r"NVIDIA H[12]00 NVL", 835e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H800", 989.4e12),
    (r"NVIDIA H20", 148e12),
    (r"NVIDIA A[18]00[ -](SXM4-|PCIE-|PG509-)?(40|80)GB( PCIe)?", 312e12),
    (r"NVIDIA A30", 165e12),
    (r"NVIDIA A40", 149.7e12),
    (r"NVIDIA A10", 125e12),
    (r"NVIDIA A10G", 70e12),
    (r"NVIDIA L40S", 362e12),
    (r"NVIDIA L40", 181e12),
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA RTX 6000 Ada Generation", 364.2e12),
    (r"NVIDIA RTX A6000", 154.8e12),
    (r"NVIDIA GeForce RTX 5090", 209.5e12),
    (r"NVIDIA GeForce RTX 4090", 165.2e12),
    (r"NVIDIA GeForce RTX 3090", 71e12),
    (r"AMD Instinct MI3(00|25)X.*", 1307.4e12),
    (r"AMD Instinct MI250X.*", 191.5e12),  # torch sees each of its two dies as a device
)
_FP16_ONLY = (
    (r"Tesla V100-SXM[23]-(16|32)GB.*", 125e12),
    (r"Tesla V100-PCIE-(16|32)GB", 112e12),
    (r"(Tesla|NVIDIA) T4", 65e12),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """The peak in FLOP/s of the device for ``fp16`` or ``bf16``; None for fp32 and for a device not known."""
    tables = {"bf16": _BF16_AND_FP16, "fp16": _BF16_AND_FP16 + _FP16_ONLY}
    for pattern, peak in tables.get(precision, ()):
        if re.fullmatch(pattern, device_name):
            return peak
    return None
