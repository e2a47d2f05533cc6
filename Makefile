# make setup        set up: .venv, about two minutes
# make run          set up and run the main job: the whole chain on real images (preset digits)
# make test         set up and run every test
# make test-fast    those of the method, the loop, data, settings and tables: a part of `make test`, in two minutes
# make test-lowest  the lowest versions that pyproject.toml allows, in an environment of their own: images, presets, costs
# make scale        on a GPU, hours: the speed of ViT-B's phases, then the study fashion-scale; called again it goes on
# make lab          set up and open JupyterLab on the notebooks
PYTHON ?= python3
PRESET ?= digits
GPU ?= gpu
BENCH ?= imagenet-vit-b
STUDY ?= fashion-scale
BIN = .venv/bin
FAST = method starts training splits data config bad_input cli report mat_tables
LOWEST = $(addprefix tests/test_,floors.py adaptive.py augmentation.py data.py stream.py presets.py import.py)
LOWEST += "tests/test_shipped.py::test_every_preset_trains_two_epochs_through_its_notebooks[smoke]"

.PHONY: setup run test test-fast test-lowest scale lab
setup: .venv/ready

run: .venv/ready
	$(BIN)/incubate run $(PRESET)

test: .venv/tests
	$(BIN)/python -m pytest

test-fast: .venv/tests
	$(BIN)/python -m pytest -n 2 -k "not compiled" $(FAST:%=tests/test_%.py)

# Tests that meet other packages most closely: images and their transforms, recipes, networks, weights of others, notebooks.
test-lowest: .venv-lowest/ready
	INCUBATE_LOWEST=1 .venv-lowest/bin/python -m pytest $(LOWEST)

# Both write tracked tables. GPU is what that of the speeds is called by, and OPTIONS are those of `incubate study`.
scale: data/results/bench_vit-b-$(GPU).csv
	$(BIN)/incubate study $(STUDY) --publish $(OPTIONS)

data/results/bench_vit-b-$(GPU).csv: | .venv/ready
	$(BIN)/incubate bench $(BENCH) --save vit-b-$(GPU)

lab: .venv/ready
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks

# uv, from inside the venv: links packages out of its cache instead of copying 5 GB. The constraints are what passed the tests.
# Compiling takes half a minute once; without it every import of torch takes twice as long where python may not write .pyc files.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"python >= 3.11 is needed, {sys.executable} is {sys.version.split()[0]}; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable .
	touch $@

.venv/tests: .venv/ready
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[test,text]'
	touch $@

# torch is downloaded once more. fsspec is named so that its lowest version is taken too: datasets allows only a few.
.venv-lowest/ready: pyproject.toml .venv/tests
	$(BIN)/python -m venv --without-pip .venv-lowest
	$(BIN)/uv pip install --quiet --compile-bytecode --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[test,wandb]' fsspec
	touch $@
