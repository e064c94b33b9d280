# Two commands do everything: `make demo` and `make test`. Both set up .venv when it is missing.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

LOWEST := build/lowest
LOWEST_TESTS := tests/peft/test_lora_oracle.py tests/peft/test_reference.py tests/peft/test_adapters.py tests/peft/test_generate.py tests/training/test_sft.py tests/training/test_trainers.py tests/faults/test_golden.py tests/test_public_api.py
RELEASE := build/release

.PHONY: install demo bench evidence evidence-page test test-all test-wheel test-lowest lint format docs slow clean help

help:
	@echo "make demo     train and compare on a real model (about 15 minutes on 2 cores)"
	@echo "make test     linters, type checks and every test of the default suite"
	@echo "make test-all the same tests with every case of the two large products (10 minutes more)"
	@echo "make test-wheel   build the wheel, install it in a clean environment, run the demo (10 minutes)"
	@echo "make test-lowest  a subset of the tests with the oldest versions allowed (5 minutes)"
	@echo "make bench    speed and memory beside plain LoRA and others (25 minutes; ARGS=--quick: 3)"
	@echo "make evidence whether routing helps: two worlds, and a real model, into outputs/evidence (under"
	@echo "              30 minutes on 2 cores; docs/evidence.md says with which options it was measured)"
	@echo "make install  only set up .venv"
	@echo "make slow     the tests that download or take long"
	@echo "make format   fix what the linter can fix"
	@echo "make docs     write the generated pages of docs/, and build the site into site/"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: install
	$(BIN)/moeadapt demo

bench: install
	$(BIN)/python -m benchmarks.speed $(ARGS)

evidence: install
	$(BIN)/python -m benchmarks.evidence.two_worlds --seeds 3 --csv outputs/evidence/two_worlds.csv
	$(BIN)/python -m benchmarks.evidence.smollm2 --seeds 3 --results outputs/evidence $(ARGS)
	$(BIN)/python -m benchmarks.evidence.page --results outputs/evidence --out outputs/evidence/evidence.md

# The page of the docs, from the results in benchmarks/results.
evidence-page: install
	$(BIN)/python -m benchmarks.evidence.page

test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -o addopts="--strict-markers --import-mode=importlib" -m "compile and not gpu" $$(grep -rl --include="test_*.py" "mark.compile" tests)

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --all-cases

# The wheel is made from the source archive, so that nothing an older build left gets into it.
test-wheel: install
	rm -rf $(RELEASE)
	mkdir -p $(RELEASE)
	$(BIN)/python -m build --no-isolation --outdir $(RELEASE) . > $(RELEASE)/build.log
	$(PYTHON) -m venv $(RELEASE)/venv
	$(RELEASE)/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(RELEASE)/*.whl
	cd $(RELEASE) && venv/bin/python ../../tests/release/plain_install.py
	$(RELEASE)/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls $(RELEASE)/*.whl)[demo]"
	cd $(RELEASE) && start=$$(date +%s) && venv/bin/moeadapt demo --steps 2 --out demo && echo "demo: $$(( $$(date +%s) - start )) s"
	wc -c $(RELEASE)/*.whl

test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e ".[train]" "pytest>=9" "beartype>=0.22"
	$(LOWEST)/bin/python -m pip check
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -p no:cacheprovider -o addopts="--strict-markers --import-mode=importlib" -m "not (slow or gpu or multi_gpu or compile or network or trajectory)" $(LOWEST_TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	mkdir -p docs
	$(BIN)/moeadapt methods --markdown > docs/methods.md.new
	mv docs/methods.md.new docs/methods.md
	$(BIN)/moeadapt methods --combinations > docs/combinations.md.new
	mv docs/combinations.md.new docs/combinations.md
	$(BIN)/python -m docs_pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "open site/index.html"

slow: install
	$(BIN)/python -m pytest -m "slow or network or trajectory"

clean:
	rm -rf .venv build dist *.egg-info
