# Start with `make demo` or `make test`; `make help` lists all targets.
# Everything is installed into .venv. Nothing outside this folder changes.

PYTHON ?= python3
VENV ?= .venv
bin := $(abspath $(VENV))/bin
pip := $(bin)/python -m pip --quiet --quiet --disable-pip-version-check
say := @printf '==> %s\n'

# Tools run in an empty folder, so that they import the installed wheel and not the folder of the same name.
outside := $(abspath build)/outside
config := $(CURDIR)/pyproject.toml
pytest := cd $(outside) && $(bin)/pytest -c $(config) --rootdir $(CURDIR)
# One process per core; the tests of a file stay together, because they share what they compile. By default the files
# with the fewest tests come last, and those take longest.
in_parallel := -n auto --dist loadfile --no-loadscope-reorder

python_sources := $(shell find fastcascade kernels -name '*.py' -o -name '*.pyi' -o -name '*.css' -o -name '*.cu' -o -name '*.cuh')
compiled_sources := $(shell find csrc -type f 2>/dev/null)
checked := fastcascade kernels tests tools $(wildcard bench examples) setup.py
cpp_sources := $(shell find csrc kernels/cuda tests -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.inl' \
	-o -name '*.cu' -o -name '*.cuh')

unexport PYTHONPATH
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

.PHONY: help
help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' Makefile | awk -F@ '{ printf "%-22s %s\n", $$1, $$2 }'

##### Installation: the environment, its packages, the wheel

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(say) "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# The build tools are pinned too, so the build is not isolated.
$(VENV)/.build-tools: $(VENV)/.created pyproject.toml constraints.txt
	$(say) "installing the build tools"
	@$(pip) install -c constraints.txt setuptools pybind11
	@touch $@

# A changed header or setup.py rebuilds everything.
build/.clean: $(compiled_sources) setup.py pyproject.toml
	@rm -rf build
	@mkdir -p $(outside)
	@touch $@

# Python files are copied again, because a deleted module would stay in build/ and end up in the wheel.
dist/.wheel: build/.clean $(VENV)/.build-tools $(python_sources) README.md LICENSE
	@command -v $(CXX) >/dev/null || { echo "no C++ compiler ($(CXX)); install one, or name yours: make CXX=clang++"; exit 1; }
	$(say) "building the wheel$(if $(compiled_sources), and compiling the kernels)"
	@rm -rf dist build/bdist* fastcascade.egg-info && find build -path '*/lib*' -name '*.py' -delete
	@$(pip) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@touch $@

$(VENV)/.dependencies: pyproject.toml constraints.txt | dist/.wheel
	$(say) "installing the packages that constraints.txt pins (PyTorch is large: the first time takes minutes)"
	@$(pip) install -c constraints.txt "$$(echo dist/*.whl)[dev]"
	@touch $@

$(VENV)/.installed: $(VENV)/.dependencies dist/.wheel
	$(say) "installing $$(basename dist/*.whl)"
	@$(pip) install --force-reinstall --no-deps dist/*.whl
	@touch $@

.PHONY: install
install: $(VENV)/.installed  ## build the wheel and install it into .venv

##### Demo, tests, checks

.PHONY: demo
demo: install  ## classify 2,000 images with the trained cascade, in about a minute
	$(say) "classifying the test images of examples/cifar10"
	@$(bin)/python examples/cifar10/demo.py

.PHONY: test test-all lint typecheck test-gpu test-gpu-bare
test: lint typecheck  ## lint, type-check, and run tests and doctests against the installed wheel
	$(say) "running the tests on $$(cd $(outside) && $(bin)/python -c 'import fastcascade; print(fastcascade.__path__[0])')"
	@$(pytest) $(in_parallel) -m "not slow" $(CURDIR)/tests
	$(say) "running the examples in the docstrings"
	@$(pytest) --doctest-modules --pyargs fastcascade

test-all: lint typecheck  ## the same, with the slow tests
	$(say) "running all tests"
	@$(pytest) $(in_parallel) $(CURDIR)/tests
	@$(pytest) --doctest-modules --pyargs fastcascade

lint: install  ## run ruff and clang-format
	$(say) "ruff"
	@$(bin)/ruff check $(checked)
	@$(bin)/ruff format --check $(checked)
	$(say) "clang-format"
	@$(bin)/clang-format --dry-run --Werror $(cpp_sources)

typecheck: install  ## run mypy on the installed package
	$(say) "mypy"
	@cd $(outside) && $(bin)/mypy --config-file $(config) --cache-dir $(CURDIR)/.mypy_cache -p fastcascade

test-gpu: install  ## on a machine with a GPU: run the GPU tests, then measure into gpu-report.json
	@$(bin)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit( \
		"torch sees no GPU here; make test runs the GPU tests in an interpreter and on CPU threads")'
	@$(pytest) --junitxml=$(CURDIR)/build/gpu-tests.xml $(CURDIR)/tests/gpu
	@$(bin)/python $(CURDIR)/tests/helpers/ran.py $(CURDIR)/build/gpu-tests.xml
	$(say) "measuring the kernels, and the cascade against torch: gpu-report.json"
	@cd $(outside) && $(bin)/python $(CURDIR)/bench/gpu.py --output $(CURDIR)/gpu-report.json

# No install and no compiler: the sources as they are, with the python that is called.
test-gpu-bare:  ## on a machine with a GPU, installing nothing: test and measure for ten minutes
	@$(PYTHON) tests/gpu/bare/run.py --output $(CURDIR)/gpu-report.json $(ARGS)

##### Benchmarks

# One by one, because a runtime without a build for this machine must not stop the others.
$(VENV)/.peers: $(VENV)/.installed
	$(say) "installing the runtimes to compare with"
	@$(bin)/python -c 'import importlib.metadata as m; print(*(r.split(";")[0] for r in m.requires("fastcascade") if "\"peers\"" in r), sep="\n")' | \
		while read -r peer; do $(pip) install -c constraints.txt "$$peer" || echo "cannot install $$peer: its results will be missing"; done
	@touch $@

# The benchmarks also measure the installed wheel; only bench/ itself comes from this checkout.
bench_folder := mkdir -p $(outside) && ln -sfn $(CURDIR)/bench $(outside)/bench && cd $(outside)

.PHONY: bench bench-docs bench-int8 bench-serving bench-suite bench-compare coverage
bench: $(VENV)/.peers  ## measure against other runtimes, and show every target
	@$(bench_folder) && $(bin)/python -m bench.run $(ARGS)

bench-docs: install  ## update the tables in docs/performance.md from the newest results
	@$(bench_folder) && $(bin)/python -m bench.tables "$$(ls -t $(CURDIR)/bench/results/*.json | head -1)"

bench-int8: $(VENV)/.peers $(VENV)/.coverage-networks  ## measure int8 against OpenVINO's and ONNX Runtime's
	@$(bench_folder) && $(bin)/python -m bench.int8 $(ARGS)

bench-serving: install  ## measure requests per second with fc.Batcher and with one call per request
	@$(bench_folder) && $(bin)/python -m bench.serving $(ARGS)

bench-suite: $(VENV)/.peers  ## run pytest-benchmark on kernels, stages, cascades and other runtimes
	@$(bench_folder) && $(bin)/python -m pytest -c $(CURDIR)/bench/suite/pytest.ini --rootdir $(CURDIR) $(CURDIR)/bench/suite $(ARGS)

bench-compare: install  ## compare two commits in one run: make bench-compare A=main B=HEAD
	@test -n "$(A)" -a -n "$(B)" || { echo "name two commits: make bench-compare A=main B=HEAD"; exit 1; }
	@$(bench_folder) && $(bin)/python -m bench.compare "$(A)" "$(B)" $(ARGS)

$(VENV)/.coverage-networks: $(VENV)/.installed
	$(say) "installing torchvision and timm"
	@$(pip) install -c constraints.txt "$$(echo dist/*.whl)[coverage]"
	@touch $@

coverage: $(VENV)/.coverage-networks $(if $(findstring --speed,$(ARGS)),$(VENV)/.peers)  ## lower the networks of torchvision and timm, and write docs/coverage.md
	@$(bench_folder) && $(bin)/python -m bench.coverage $(ARGS)

##### Documentation

$(VENV)/.docs: $(VENV)/.installed
	$(say) "installing MkDocs"
	@$(pip) install -c constraints.txt "$$(echo dist/*.whl)[docs]"
	@touch $@

.PHONY: docs
docs: $(VENV)/.docs  ## build the documentation into build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --quiet

##### Housekeeping

.PHONY: format
format: $(VENV)/.dependencies  ## apply ruff's fixes, and format Python, C++ and CUDA
	@$(bin)/ruff check --fix $(checked)
	@$(bin)/ruff format $(checked)
	@$(bin)/clang-format -i $(cpp_sources)

.PHONY: clean
clean:  ## remove build products and .venv
	rm -rf $(VENV) build dist demo fastcascade.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
