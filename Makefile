# TORCH names the torch build that a fresh environment gets.
TORCH ?= torch==2.13.0
# Builds of torch for CUDA bring their own Triton; others get this one, for the tests of the kernels.
TRITON ?= triton==3.6.0
PYTHON ?= python3
# processes that share the tests
JOBS ?= 2
# where make gpu writes
OUT ?= runs/gpu
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install quickstart quickstart-finetune test slurm-test slurm-soak chaos soak fault-matrix power-loss corruption fuzz lint bench gpu lock clean

help:
	@echo "make quickstart   install, prepare a corpus, train a small GPT for about three minutes, sample from it"
	@echo "make quickstart-finetune   pre-train, fine-tune, compare: which package does a docstring belong to? Under five minutes"
	@echo "make test         install and run the tests"
	@echo "make slurm-test   start a Slurm of two nodes on this machine and test the batch scripts on it"
	@echo "make slurm-soak   every way in which Slurm stops a job, in half an hour"
	@echo "make chaos N=50   kill small runs 50 times and compare what comes out, bit for bit"
	@echo "make soak         disturb one long run in every way, every six seconds, for more than an hour"
	@echo "make fault-matrix   resume, other numbers of ranks, a failing disk and NaN in every ZeRO stage and precision"
	@echo "make power-loss   replay what a loss of power can leave of small runs' checkpoints"
	@echo "make corruption N=20000   damage checkpoints 20,000 times and see that it is found"
	@echo "make fuzz N=20000   20,000 random inputs to each reader of strangers' files: a right result or an error in a line"
	@echo "make lint         check style"
	@echo "make bench        measure data preparation, training, fine-tuning, checkpoints, generation and serving on this CPU"
	@echo "make gpu          test the kernels on this machine's GPU and measure them, in ten minutes; output in OUT"
	@echo "make install      only create $(VENV)"
	@echo "make lock         write requirements.lock anew from pyproject.toml"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 12) or sys.exit( \
	    'error: MegaGPT needs Python 3.10 to 3.12 and this is %d.%d; name another: make PYTHON=python3.11' % v)"
	@echo "installing into $(VENV); the first time this takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet '$(TRITON)'
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-deps --no-build-isolation --editable . # by the locked setuptools
	touch $@

# Everything but torch and Triton, whose build depends on the machine. What is locked stays unless UPGRADE=--upgrade.
lock: install
	$(BIN)/pip install --quiet uv
	printf "torch; sys_platform == 'none'\ntriton; sys_platform == 'none'\n" >$(VENV)/elsewhere.txt
	$(BIN)/uv pip compile pyproject.toml --extra all --extra dev --universal --python-version 3.10 --generate-hashes \
	    --override $(VENV)/elsewhere.txt --no-emit-package torch --no-emit-package triton --no-annotate --no-header \
	    $(UPGRADE) --quiet --output-file requirements.lock

quickstart: install
	$(BIN)/python -m megagpt.tools.quickstart

quickstart-finetune: install
	$(BIN)/python -m megagpt.tools.quickstart_finetune

# Whole files go to JOBS processes, the longest first: what a file's tests share is made once. One thread each: threads
# that wait for one another while others have the cores cost several times what they save.
test: install
	OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),1) $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile \
	    --no-loadscope-reorder

slurm-test: install
	.ci/install-slurm
	$(BIN)/python -m pytest tests/test_slurm_*.py

slurm-soak: install
	.ci/install-slurm
	$(BIN)/python -m pytest tests/soak_slurm.py

chaos: install
	PYTHONPATH=. $(BIN)/python tests/chaos.py --kills $(or $(N),50)

soak: install
	PYTHONPATH=. $(BIN)/python tests/soak.py

fault-matrix: install
	PYTHONPATH=. $(BIN)/python tests/fault_matrix.py

power-loss: install
	PYTHONPATH=. $(BIN)/python tests/power_loss.py

corruption: install
	PYTHONPATH=. $(BIN)/python tests/corruption.py --count $(or $(N),20000)

fuzz: install
	PYTHONPATH=. $(BIN)/python tests/fuzz.py --count $(or $(N),20000)

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: install
	$(BIN)/python kernels/benchmarks/cpu_data.py --output build/bench
	$(BIN)/python kernels/benchmarks/cpu_train.py --output build/bench
	$(BIN)/python kernels/benchmarks/cpu_finetune.py --output build/bench
	$(BIN)/python kernels/benchmarks/cpu_checkpoint.py --output build/bench
	$(BIN)/python kernels/benchmarks/cpu_generate.py --output build/bench
	$(BIN)/python kernels/benchmarks/cpu_serve.py --output build/bench

# Uses PYTHON where that has a torch that sees the GPU, else the virtual environment.
gpu:
	PYTHON='$(PYTHON)' OUT='$(OUT)' kernels/gpu.sh

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
