# Needs only Python 3.10 to 3.13 and make. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LABEL := .venv_monailabel
SITE := import sysconfig; purelib = sysconfig.get_path('purelib');

.PHONY: setup dev demo check test test-all mutate lint docs pico bundles bench clean

setup: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/samseg demo --output demo

PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# what is quick enough to be run after every change
check: lint
	$(PYTEST) -m "not slow and not whole"

# COVERAGE=1 measures branch coverage, too: tracing every line makes the tests half as slow again
test: dev
	$(PYTEST) -m "not whole" $(if $(COVERAGE),--cov --cov-report term:skip-covered --cov-fail-under 90)

# and what takes minutes by itself: both studies and SAM at their real sizes, every chain of killed trainings; MONAI Label,
# peft, transformers and Ray, whose tests are skipped where they cannot be installed
test-all: test
	-$(MAKE) $(LABEL)/.installed
	-$(BIN)/python -m pip install --quiet --editable ".[peft,ray]"
	$(PYTEST) -m whole

# MONAI Label with what its bundles' inference imports, beside the packages of .venv: all that its server needs is 8 GB
$(LABEL)/.installed: tools/monailabel.txt $(VENV)/.installed-dev
	rm -rf $(LABEL)
	$(BIN)/python -m venv --without-pip $(LABEL)
	$(BIN)/python -c "$(SITE) print('import site; site.addsitedir(%r)' % purelib)" \
	    > `$(LABEL)/bin/python -c "$(SITE) print(purelib)"`/beside.pth
	$(BIN)/python -m pip --python $(LABEL)/bin/python install --quiet --no-deps --requirement tools/monailabel.txt \
	    > $(LABEL)/install.log 2>&1
	$(LABEL)/bin/python -c "import monailabel.tasks.infer.bundle" >> $(LABEL)/install.log 2>&1
	touch $@

# inputs changed in one or two places, to all readers, each judged by an oracle: a table of what came of them
mutate: dev
	$(BIN)/python -m tests.mutations --count $(or $(COUNT),10000) --seed $(or $(SEED),0)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# site/index.html opens from the disk; the search needs a server: python -m http.server --directory site
docs: dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pico: setup
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tools.pico --output samseg_monai/sam

bundles: setup
	$(BIN)/samseg bundle build --task meningioma --strategy zero_shot --output bundles
	$(BIN)/samseg bundle build --task meningioma --strategy lora --output bundles
	$(BIN)/samseg bundle build --task meningioma --strategy full --output bundles
	$(BIN)/samseg bundle build --task meningioma --strategy medsa --output bundles
	$(BIN)/samseg bundle build --task abdomen --strategy ladder --output bundles
	$(BIN)/samseg bundle build --task abdomen --strategy ladder_paper --output bundles
	$(BIN)/samseg bundle build --task abdomen --strategy cnn_only --output bundles
	$(BIN)/samseg bundle build --task abdomen --strategy sam_only --output bundles
	$(BIN)/samseg bundle build --task abdomen --strategy samed --output bundles
	$(BIN)/samseg bundle build --task abdomen --strategy h_sam --output bundles

bench: dev
	for script in $(filter-out benchmarks/measuring.py,$(wildcard benchmarks/*.py)); do \
	    $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(LABEL) demo site build *.egg-info
