"""Fine-tuning: ``deepspeed finetune.py --ds_config ds_configs/cpu.json ...``; also torchrun, srun and python."""

import sys

from megagpt.finetune.main import main

if __name__ == "__main__":
    sys.exit(main())
