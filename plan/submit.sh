#!/bin/sh
# From the repository, as megagpt plan wrote it.
exec sbatch --nodes=1 --ntasks-per-node=2 --gpus-per-node=2 --time=24:00:00 slurm/pretrain.sbatch --ds_config plan/ds_config.json --model 13b --data data/corpus --activation_checkpointing 2 --max_steps 2288818 --save_interval 17 --run_dir runs/13b
