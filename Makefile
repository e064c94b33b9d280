# Two commands do everything: `make demo` and `make test`. Both set up .venv when it is missing.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo bench evidence evidence-page test lint format docs slow clean help

help:
	@echo "make demo     train and compare on a real model (about 15 minutes on 2 cores)"
	@echo "make test     linters, type checks and every test of the default suite"
	@echo "make bench    speed and memory beside plain LoRA and others (25 minutes; ARGS=--quick: 3)"
	@echo "make evidence whether routing helps: two worlds, and a real model (30 minutes on 2 cores)"
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
	$(BIN)/python -m benchmarks.evidence.two_worlds
	$(BIN)/python -m benchmarks.evidence.smollm2 $(ARGS)
	$(MAKE) evidence-page

evidence-page: install
	$(BIN)/python -m benchmarks.evidence.page

test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -o addopts="--strict-markers --import-mode=importlib" -m "compile and not gpu"

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
