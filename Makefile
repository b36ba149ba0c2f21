# make            run and quantize, for the machine at hand
# make run_cuda   the same for an NVIDIA GPU; needs the CUDA Toolkit
# make demo       32 sequences from a small trained model, on the screen in a few seconds
# make demo-lora  a LoRA adapter: the same prompt without and with it, and both perplexities
# make bench      types of weights, batch sizes, quality and other engines in one report: of the demo model, or MODEL=...
# make speed      (or bench MODEL=mistral-7b) a 7B's speed beside this machine's ceilings, and llama.cpp where it is installed; hours,
#                 26 GB (52 with llama.cpp)
# make test_cuda  the tests on a GPU
# make test       everything that can be tested here; sets up what the Python tests need under build/
CC      = cc
PYTHON  = python3
CFLAGS  = -O3 -march=native -Wall -Wextra
OPENMP := $(shell echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp || echo -Wno-unknown-pragmas)
NVCC    = nvcc
# a Hopper's own instructions are in sm_90a alone, which `native` does not choose
ARCH   := $(if $(filter 9.0,$(shell nvidia-smi --query-gpu=compute_cap --format=csv 2>/dev/null | tail -1)),90a,native)
NVCCFLAGS = -O3 -arch=$(if $(filter native,$(ARCH)),native,sm_$(ARCH))
# what memcmp reads is looked at where it is a call
SANITIZE = -g -O2 -march=native -fno-builtin-memcmp -fsanitize=address,undefined -fno-sanitize-recover=all

all: run quantize

run: run.c model.h simd.h report.h
	$(CC) $(CFLAGS) $(OPENMP) run.c -lm -o $@

quantize: quantize.c calibrate.h run.c model.h simd.h report.h
	$(CC) $(CFLAGS) $(OPENMP) quantize.c -lm -o $@

build/test_all: test_all.c quantize.c calibrate.h run.c model.h simd.h report.h
	@mkdir -p build
	$(CC) $(CFLAGS) $(OPENMP) test_all.c -lm -o $@

build/test_all_sanitized: test_all.c quantize.c calibrate.h run.c model.h simd.h report.h
	@mkdir -p build
	$(CC) $(SANITIZE) $(OPENMP) test_all.c -lm -o $@

# for the GPU at hand; ARCH=75 for a T4, ARCH=90a for an H200
run_cuda build/run_cuda: run_cuda.cu hopper.h run.c model.h simd.h report.h
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) run_cuda.cu -o $@

build/test_cuda: test_all.c quantize.c calibrate.h run_cuda.cu hopper.h run.c model.h simd.h report.h
	@mkdir -p build
	$(NVCC) $(NVCCFLAGS) -x cu test_all.c -o $@

test_cuda: build/test_cuda
	build/test_cuda

demo: run
	./run demo/tiny-mistral-q8.bin -i "Once upon a time" -b 32 -n 200

demo-lora: run
	$(PYTHON) demo/lora.py

build/limits: bench/limits.c
	@mkdir -p build
	$(CC) $(CFLAGS) $(OPENMP) bench/limits.c -o $@

build/limits.so: bench/limits.c
	@mkdir -p build
	$(CC) $(CFLAGS) $(OPENMP) -shared -fPIC -DLIMITS_NO_MAIN bench/limits.c -o $@

build/steps: bench/steps.c bench/limits.c run.c model.h simd.h report.h
	@mkdir -p build
	$(CC) $(CFLAGS) $(OPENMP) -DLIMITS_NO_MAIN bench/steps.c bench/limits.c -lm -o $@

build/bench-venv/installed: requirements.txt bench/requirements.txt
	$(PYTHON) -m venv --clear build/bench-venv
	build/bench-venv/bin/pip install -q --disable-pip-version-check -r requirements.txt -r bench/requirements.txt
	touch $@

MODEL = demo/tiny-mistral
bench: $(if $(filter mistral-7b,$(MODEL)),speed,report)

report: run quantize build/bench-venv/installed
	build/bench-venv/bin/python bench/bench.py --model $(MODEL) $(BENCH_FLAGS)

speed: run quantize build/limits.so
	$(PYTHON) bench/speed.py $(BENCH_FLAGS)

test: run quantize build/test_all build/test_all_sanitized
	$(PYTHON) tests/run_tests.py $(TEST_FLAGS)

clean:
	rm -rf run run_cuda quantize build

.PHONY: all demo demo-lora bench report speed test test_cuda clean
