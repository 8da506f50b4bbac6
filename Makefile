# `make serve` on a fresh machine: install, prepare, serve the demo three ways. `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
PACKAGES := core/quantserve bench/src/quantserve_bench quantize/src/quantserve_quantize client/src/quantserve_client explorer/src/quantserve_explorer kernels/src/quantserve_kernels $(wildcard plugins/*/src/quantserve_*) \
	examples/plugins/quantserve-rtn8/src/quantserve_rtn8 benchmarks
CONFIG ?= models/demo.yaml
ARGS ?=

.PHONY: help setup dev prepare serve smollm2 test test-quick corpus fuzz mutants matrix sanitize arm lint format docs site bench bench-load bench-serving bench-decode bench-kernels bench-gpu bench-quality soak clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 15

setup: ## install everything that serving needs into .venv
	@$(PYTHON) scripts/setup.py

dev: ## the same and the tools for tests and linters
	@$(PYTHON) scripts/setup.py --dev

prepare: setup ## make the quantized exports of the demo model
	@$(BIN)/python examples/prepare.py

serve: prepare ## serve the demo as fp16, awq and squeezellm at once (CONFIG=, ARGS=--port 9000)
	@exec $(BIN)/quantserve serve $(CONFIG) $(ARGS)

smollm2: dev ## make SmolLM2 in bf16, AWQ and SqueezeLLM of its GGUF file for CONFIG=models/smollm2.yaml, and measure them
	@$(BIN)/python examples/smollm2.py

test: dev ## run all tests, real engines included, most of them in parallel (ARGS="tests/serve -k drain")
	@$(BIN)/python examples/prepare.py
	@exec $(BIN)/python scripts/run_tests.py $(ARGS)

test-quick: dev ## run the tests that start no engine and take seconds
	@exec $(BIN)/python scripts/run_tests.py -m "not vllm and not ray and not slow" $(ARGS)

fuzz: dev ## fuzz the readers of headers, configs, pickles and frames; about 20 minutes (ARGS="headers --count 1000 --seed 1")
	@cd tests && exec ../$(BIN)/python -W ignore -m fuzzing $(ARGS)

mutants: dev ## put small defects into good plugins and see whether the conformance kit catches them; up to half an hour (ARGS="rtn8 --light")
	@cd tests && exec ../$(BIN)/python -m mutants $(ARGS)

matrix: dev ## greedy tokens of all methods, dtypes, ranks and modes against transformers; an hour (ARGS="--only fp8")
	@cd tests && exec ../$(BIN)/python -W ignore -m matrix $(ARGS)

compat: dev ## the conformance kit on every plugin with vLLM 0.29 to the newest, into docs/compatibility.md; hours (ARGS=0.31.0)
	@exec $(BIN)/python scripts/compat.py $(ARGS)

sanitize: dev ## the kernels' CPU tests under AddressSanitizer and UndefinedBehaviorSanitizer; builds for minutes
	@exec $(BIN)/python kernels/tests/sanitize.py $(ARGS)

arm: dev ## the kernels of ARM processors, cross-compiled and run under QEMU; builds for minutes (ARGS=--count)
	@exec $(BIN)/python kernels/tests/arm/run.py $(ARGS)

corpus: dev ## judge public checkpoints of all families and print the table (ARGS="--wrong gemma")
	@PYTHONPATH=tests exec $(BIN)/python -m corpus $(ARGS)

lint: dev ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES) scripts examples/prepare.py examples/smollm2.py kernels/setup.py
	$(BIN)/lint-imports

format: dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: dev ## write the generated parts of docs/ anew
	@$(BIN)/python scripts/update_docs.py

site: dev ## build the documentation site into build/site; the last line says how to look at it
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site is ready: python3 -m http.server --bind 127.0.0.1 --directory build/site 8001"

bench: dev ## the demo model under load, three ways, into docs/benchmarks.md; about 10 minutes
	@$(BIN)/python examples/prepare.py
	@exec $(BIN)/python -m benchmarks.load demo $(ARGS)

bench-load: dev ## the load generator's own cost (ARGS=--quick)
	@exec $(BIN)/python -m benchmarks.load cost $(ARGS)

bench-serving: dev ## the serving path beside vLLM's own server and Ray Serve LLM; one to two hours (ARGS=--quick)
	@$(BIN)/python examples/prepare.py
	@exec $(BIN)/python -m benchmarks.serving $(ARGS)

bench-decode: dev ## end-to-end speed through vLLM, llama.cpp beside it; about 20 minutes (ARGS=--quick; an hour with ARGS="--variants all")
	@exec $(BIN)/python -m benchmarks.decode $(ARGS)

bench-kernels: dev ## kernel speed against torch, vLLM and memory bandwidth (ARGS=--quick)
	@exec $(BIN)/python -m benchmarks.kernels $(ARGS)

bench-gpu: dev ## kernel speed against cuBLAS on an NVIDIA GPU, and a decode loop; 80 s (ARGS="--models 70b")
	@exec $(BIN)/python -m benchmarks.gpu $(ARGS)

bench-quality: dev ## what SmolLM2-135M loses in every method; quantizes 16 times, hours on two cores (ARGS="--only awq,gptq")
	@exec $(BIN)/python -m benchmarks.quality $(ARGS)

soak: dev ## a server under mixed load with a fault every minute, and what it lost or leaked; an hour (ARGS="--minutes 3")
	@$(BIN)/python examples/prepare.py
	@exec $(BIN)/python -m benchmarks.soak $(ARGS)

clean: ## remove what can be made again, .venv excepted
	rm -rf build dist kernels/build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf examples/demo-model/awq examples/demo-model/squeezellm
	find core bench quantize client explorer kernels plugins tests scripts examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
