# make demo   set up .venv and run the main job on real digits      make test       set up .venv, lint, types, tests
# make demo-text   the same with a real language model              make test-full  the long sweeps too
# make docs   build the site of docs/ into site/
# make matrix  try every kind in every place where people train, print the table and renew docs/matrix.md
# make laws   print adapter × layer × law                           make bench      the measurements in benchmarks/
# make gpu    all that needs a GPU, in ten minutes: kernels tested and timed, steps, merges; into benchmarks/results/<gpu>.json
# make test-oldest   the fast tests without other libraries, on the oldest dependencies of pyproject.toml, in .venv-oldest
# make test-newest   the same on the newest that pip finds, in .venv-newest
# make evidence   train 156 runs past overfitting and judge the monitor's rules by them (hours)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS := benchmarks/results
STEPS := 320x320@64,320x320@512,320x320@2048,1280x1280@64,1280x1280@512,1280x1280@2048,4096x4096@64,4096x4096@512,4096x4096@2048,320x320k1@64,320x320k3@64,1280x1280k1@16,1280x1280k3@16
# tests of what needs no other library than the package's own dependencies
CORE := tests/kernels tests/delta tests/adapters tests/wrapping tests/training --ignore=tests/wrapping/test_presets.py
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: matrix demo demo-text docs test test-full test-oldest test-newest laws bench gpu evidence readme format clean

# the demo imports little of what it installs: to compile all of that would take longer than the import
$(VENV)/ready-demo: COMPILE := --no-compile
$(VENV)/ready-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(COMPILE) -c constraints.txt -e ".[$*]"
	touch $@

# tests take warnings for errors, also those of compiling what the demo installed: all of it is compiled before them
$(VENV)/compiled: $(VENV)/ready-dev
	$(BIN)/python -W ignore -m compileall -q -j 2 $(VENV)/lib > $(VENV)/compiled.log 2>&1 || test -s $(VENV)/compiled.log
	touch $@

demo: $(VENV)/ready-demo
	$(BIN)/python scripts/fetch_assets.py digits
	$(BIN)/python examples/digits/demo.py

demo-text: $(VENV)/ready-text
	$(BIN)/python scripts/fetch_assets.py text
	$(BIN)/python examples/text_minilm.py

docs: $(VENV)/ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build --strict

test: $(VENV)/compiled docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -n 2 --dist loadgroup -m "not slow"

test-full: $(VENV)/compiled
	$(BIN)/pytest -n 2 --dist loadgroup

.venv-oldest/ready: CONSTRAINTS := -c constraints-oldest.txt
.venv-%/ready: pyproject.toml constraints-oldest.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --upgrade $(CONSTRAINTS) -e . pytest pytest-xdist hypothesis
	touch $@

test-oldest test-newest: test-%: .venv-%/ready
	.venv-$*/bin/python -m pytest -n 2 -m "not slow" $(CORE)

laws: $(VENV)/ready-dev
	$(BIN)/python scripts/laws_table.py

matrix: $(VENV)/ready-dev
	$(BIN)/python scripts/matrix.py

bench: $(VENV)/ready-dev
	$(BIN)/python scripts/fetch_assets.py text
	$(BIN)/python benchmarks/checkpoint.py --lycoris --save
	$(BIN)/python benchmarks/monitor.py --save
	$(BIN)/python benchmarks/shortcuts.py --save
	$(BIN)/python benchmarks/overhead.py --save
	$(BIN)/python benchmarks/quantised.py --save
	$(BIN)/python benchmarks/unet.py --save
	$(BIN)/python benchmarks/transformer.py --peers lycoris,peft --save
	$(BIN)/python benchmarks/routes.py --save
	$(BIN)/python benchmarks/starts.py --save
	$(BIN)/python benchmarks/curves.py --save
	$(BIN)/peftkit bench step --shapes $(STEPS) --dtype fp32,bf16 --peers lycoris,peft --rounds 3 --json $(RESULTS)/step.json --force
	$(BIN)/peftkit bench merge --kinds lora,loha,lokr,dora,loldu --shapes sd15-unet --peers lycoris,peft --rounds 3 \
		--json $(RESULTS)/merge.json --force
	$(BIN)/peftkit bench merge --kinds oft --shapes sd15-unet --peers lycoris --rounds 3 --json $(RESULTS)/merge-oft.json --force
	$(BIN)/peftkit bench ops --shapes 4096x4096@512 --operations dense,add --dtype fp32,bf16 \
		--peers lycoris,peft --rounds 5 --json $(RESULTS)/ops.json --force

gpu: $(VENV)/ready-dev
	$(BIN)/python benchmarks/gpu.py

evidence: $(VENV)/ready-dev
	$(BIN)/python scripts/fetch_assets.py text
	$(BIN)/python benchmarks/trajectories.py
	$(BIN)/python benchmarks/early_stopping.py --save

readme: $(VENV)/ready-dev
	$(BIN)/python scripts/readme_tables.py

format: $(VENV)/ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest out site .assets
