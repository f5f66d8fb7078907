# The one list of commands; `make help` explains each.
PYTHON ?= python3
# Empty: the newest packages.
CONSTRAINTS ?= constraints.txt
# A test that takes longer than 15 minutes hangs: it fails, and its stack is printed.
HANGING = --max-worker-restart 1 -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

.DEFAULT_GOAL := help
.PHONY: help demo lab run reproduce test test-gpu test-fast lint format pipeline unet vgg table links benchmark clean

help: ## list every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed ## one simulated frame through the pipeline, into demo/: about 20 seconds; IMAGE=my.png for your own
	@test -n "$(IMAGE)" || .venv/bin/python -c 'from helpers import synthetic; synthetic.make_busi("demo/frames", 1)'
	.venv/bin/python -m helpers.pipeline "$(or $(IMAGE),demo/frames/Dataset_BUSI_with_GT/benign/benign (1).png)" --out demo

lab: .venv/installed ## open the notebooks in JupyterLab
	.venv/bin/jupyter lab notebooks

run: .venv/installed ## execute the notebooks, quick profile, into executed/, with index.html: about 20 minutes
	@echo "Executing the notebooks (NB_PROFILE=$(or $(NB_PROFILE),quick)) into executed/: quick takes about 20 minutes on 2 cores"
	NB_PROFILE=$(or $(NB_PROFILE),quick) .venv/bin/python notebooks/execute.py

reproduce: .venv/installed ## execute the notebooks in full, as the committed results were made, and write results/: about 4 hours
	NB_PROFILE=full NB_RESULTS=results .venv/bin/python notebooks/execute.py

test: .venv/installed ## test everything, each notebook included: about 10 minutes on 2 cores
	@echo "Testing helpers/ and every notebook on synthetic images: about 10 minutes on 2 cores"
	NB_PROFILE=test .venv/bin/python -m pytest -n 2 --no-loadscope-reorder $(HANGING)

test-gpu: .venv/installed ## test the notebooks in full, as on a GPU runner, with the scores that they must reach
	NB_PROFILE=full NB_DRAW=no NB_RESULTS="$(CURDIR)/executed/results" \
		.venv/bin/python -m pytest --nbval-cell-timeout=3600 notebooks

test-fast: .venv/installed ## test helpers/ without notebooks, Ray and kills: under a minute on 2 cores
	NB_PROFILE=test .venv/bin/python -m pytest -n 2 --no-loadscope-reorder -m "not slow" tests

lint: .venv/installed ## check style and types: seconds
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: .venv/installed ## put code and notebooks into the house style
	.venv/bin/ruff check --fix
	.venv/bin/ruff format
	.venv/bin/nbstripout notebooks/*.ipynb

pipeline: .venv/installed ## train the automatic pipelines on BUSI and BUS-BRA, write their weights and results: hours
	.venv/bin/python results/make_pipelines.py

unet: .venv/installed ## train the U-Net with three seeds, write its results: an hour
	.venv/bin/python results/make_unet.py

vgg: .venv/installed ## train VGG-16 on every fold with three seeds, write its results: hours; WEIGHTS=my.safetensors for a file
	.venv/bin/python results/make_vgg.py --weights "$(or $(WEIGHTS),imagenet)"

table: .venv/installed ## make README's tables and figure from results/
	.venv/bin/python results/make_tables.py

links: ## write the address of a fork, REPOSITORY=https://github.com/me/fork, into badges, cells and pyproject
	@echo "$(REPOSITORY)" | grep -Eq '^https://github.com/[A-Za-z0-9-]+/[A-Za-z0-9._-]+$$' || \
		{ echo "REPOSITORY is '$(REPOSITORY)'; say make links REPOSITORY=https://github.com/me/fork" >&2; exit 2; }
	@old=$$(sed -n 's|^Repository = "https://github.com/\(.*\)"|\1|p' pyproject.toml); \
	new=$$(echo "$(REPOSITORY)" | sed 's|https://github.com/||; s|\.git$$||'); \
	sed -i.before "s|github.com/$$old|github.com/$$new|g; s|/github/$$old|/github/$$new|g" \
		pyproject.toml CITATION.cff README.md notebooks/*.ipynb && \
	rm -f pyproject.toml.before CITATION.cff.before README.md.before notebooks/*.before && \
	echo "github.com/$$old is github.com/$$new now"

benchmark: .venv/installed ## time embedding, fine-tuning, the U-Net's input, the pipeline, searches and bulk work: an hour
	FUZZ=400 .venv/bin/python -m pytest -q tests/test_folder.py -k damaged
	.venv/bin/python tests/benchmarks/embed.py
	.venv/bin/python tests/benchmarks/unet.py
	.venv/bin/python tests/benchmarks/finetune.py
	.venv/bin/python tests/benchmarks/pipeline.py
	.venv/bin/python tests/benchmarks/search.py
	.venv/bin/python tests/benchmarks/bulk.py

clean: ## remove .venv, executed/, demo/ and build/
	rm -rf .venv executed demo build

.venv/installed: requirements.txt requirements-scale.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit("Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; say make PYTHON=python3.12 ...")'
	@echo "Installing into .venv (first time only): about 3 minutes, 8 GB"
	@$(PYTHON) -m venv .venv
	@.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-scale.txt $(addprefix -c ,$(CONSTRAINTS)) -e .
	@touch $@
