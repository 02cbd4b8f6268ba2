# SPDX-License-Identifier: MIT
# make demo      build, then train, export and reload a model on real images
# make test      build, check the style, then run the tests
# make build     install this folder (editable); again after a change of C++ or of this folder's list of files
# make test-torch TORCH=torch==2.15.0   the same wheel under another torch, in an environment of its own (TORCH_ENV)
# make test-integrations   models of other libraries that import natten, unmodified, in environments of their own
# make cuda      the CUDA library, built with nvcc whatever torch is at hand, beside the installed one
# make test-cuda-build | test-mutations   the CUDA kernels: all instantiations; broken on purpose
# make lint | test-slow | bench | asan | wheel | clean
#
# All set everything up: in the active virtual environment if it has torch >= 2.11, else in .venv, which sees the
# system's torch if that is new enough and gets TORCH otherwise. PYTHON=..., TORCH=... and PIP_ARGS=... override.
PYTHON ?= python3
default_torch := torch==2.13.0
TORCH ?= $(default_torch)
PIP_ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# test-torch has TORCH in an environment of its own; the one that builds keeps its torch.
torch_here := $(if $(filter test-torch,$(MAKECMDGOALS)),$(default_torch),$(TORCH))

mode := $(shell $(PYTHON) -c "import sys, importlib.metadata as m; \
	new = tuple(map(int, m.version('torch').split('.')[:2])) >= (2, 11); \
	print(('here' if sys.prefix != sys.base_prefix else 'system') if new else '')" 2>/dev/null)
PY := $(if $(filter here,$(mode)),$(PYTHON),.venv/bin/python)
# The mark lies in the environment that it speaks of: another one that is activated later has none yet.
ready := $(if $(filter here,$(mode)),$(shell $(PYTHON) -c "import sys; print(sys.prefix)"),.venv)/natten_ops-ready
pip := $(PY) -m pip --no-input
scripts := $$($(PY) -c "import sysconfig; print(sysconfig.get_path('scripts'))")
torch_found := $$($(PY) -c "import importlib.metadata as m; print(m.version('torch'))")

demo: build
	$(PY) examples/demo.py

# A file's tests stay together: they share what is compiled.
in_parallel := -n auto --maxprocesses 4 --dist loadfile
test: build lint
	$(PY) -m pytest -q $(in_parallel)

test-slow: build
	$(PY) -m pytest -q -m slow

# A wheel that was built with the torch at hand, installed beside another torch. Tests that look at the source tree, or
# at the tools of development, stay out.
TORCH_ENV ?= .venv-$(subst ==,-,$(TORCH))
test-torch: $(ready)
	rm -rf build/wheel
	$(pip) wheel -q --no-deps --no-build-isolation -w build/wheel .
	test -d "$(TORCH_ENV)" || { $(PYTHON) -m venv "$(TORCH_ENV)" && \
	"$(TORCH_ENV)/bin/python" -m pip --no-input install -q $(PIP_ARGS) "$(TORCH)" numpy pytest pytest-xdist hypothesis expecttest; }
	"$(TORCH_ENV)/bin/python" -m pip --no-input install -q --no-deps --force-reinstall build/wheel/*.whl
	cd tests && "$(abspath $(TORCH_ENV))/bin/pytest" -q -p no:cacheprovider $(in_parallel) $(addprefix --ignore=test_,$(addsuffix .py,bench demo layout packaging portable)) $(TESTS)

# An environment for each version of transformers; it sees what the building environment has installed.
TRANSFORMERS ?= 4.57.6 4.53.3
test-integrations: build
	for version in $(TRANSFORMERS); do env=.venv-transformers-$$version; \
	test -d $$env || { $(PYTHON) -m venv $$env && $(PY) -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
	> $$env/lib/$$($(PY) -c "import sys; print('python%d.%d' % sys.version_info[:2])")/site-packages/building.pth && \
	$$env/bin/python -m pip --no-input install -q $(PIP_ARGS) transformers==$$version; } && \
	$$env/bin/python -m pytest -q -m integrations tests/test_integrations.py || exit 1; done

lint: $(ready)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy natten_ops lowerings

bench: build
	$(PY) -m bench.run --rounds 5 --out bench/results/cpu.csv
	$(PY) -m bench.compare bench/results/cpu.csv --report docs/benchmarks.md

build: $(ready)
	$(pip) install -q --no-deps --no-build-isolation -e .

# What nvcc makes of every kernel; what the tests notice of changes to them (about two hours).
test-cuda-build: build
	$(PY) -m pytest -q -m "slow or not slow" tests/test_cuda_build.py
test-mutations: build
	$(PY) -m pytest -q -m "slow or not slow" tests/test_mutations.py

# A build folder of its own: `make build` goes on without it. NATTEN_OPS_CUDA_ARCHS=90a-real builds for one GPU.
NATTEN_OPS_CUDA_ARCHS ?= 80-real;90a-real;80-virtual
cuda: build
	PATH="$(scripts):$$PATH" && packages=$$($(PY) -c "import sysconfig; print(sysconfig.get_path('platlib'))") && \
	cmake -S . -B build/cuda -G Ninja -DNATTEN_OPS_CUDA=ON "-DNATTEN_OPS_CUDA_ARCHS=$(NATTEN_OPS_CUDA_ARCHS)" \
	-DPython_EXECUTABLE="$$(command -v $(abspath $(PY)))" -DCMAKE_INSTALL_PREFIX="$$packages" && \
	cmake --build build/cuda --target natten_ops_cuda && bytes=$$(stat -c %s build/cuda/libnatten_ops_cuda.so) && \
	{ test $$bytes -lt 60000000 || { echo "libnatten_ops_cuda.so has $$bytes bytes, 60000000 or more: build fewer NATTEN_OPS_CUDA_ARCHS" >&2; exit 1; }; } && \
	cmake --install build/cuda --component cuda

# The kernels' tests with address and undefined-behaviour sanitizers, from an install of their own, which the finder of the
# editable install would hide. Not the test that takes memory away: the sanitizer needs it first.
asan: $(ready)
	rm -rf .asan
	$(pip) install -q --no-deps --no-build-isolation --target .asan -C build-dir=build/asan -C cmake.define.NATTEN_OPS_SANITIZE=ON .
	cd tests && PYTHONPATH=$(CURDIR)/.asan ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" $(abspath $(PY)) -c \
	"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]; \
	import natten_ops, pytest; assert '.asan' in natten_ops.library_path(); \
	sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'test_ops.py', 'test_tiles.py', 'test_unfused.py', 'test_nested.py', '-k', 'not instruction_set and not no_memory']))"

# Fails if the library needs other libraries than torch's and the system's, or more of torch than its stable ABI.
wheel: $(ready)
	rm -rf dist
	$(pip) wheel -q --no-deps --no-build-isolation -w dist/built .
	PATH="$(scripts):$$PATH" $(PY) -m auditwheel repair --exclude libtorch_cpu.so -w dist dist/built/*.whl
	$(PY) -m zipfile -e dist/*.whl dist/unpacked
	$(PY) -c "import sys; from torch_abi_audit.cli import main; sys.exit(main())" --check torch dist/unpacked/natten_ops/libnatten_ops.so
	rm -rf dist/built dist/unpacked
	ls dist

# First the build tools, then this folder with the tools of its tests, lint and demo. Torch is named as it is found, so
# that pip can neither replace it nor fetch another.
$(ready): pyproject.toml Makefile
	$(if $(filter here,$(mode)),,$(PYTHON) -m venv $(if $(mode),--system-site-packages) .venv)
	$(pip) install -q $(PIP_ARGS) $(if $(mode),,"$(torch_here)") scikit-build-core cmake ninja
	$(pip) install -q $(PIP_ARGS) --no-build-isolation -e ".[dev]" "torch==$(torch_found)"
	touch $@

clean:
	rm -rf build dist demo_out .asan .venv .venv-*

.PHONY: demo cuda test-cuda-build test-mutations test test-torch test-slow test-integrations lint bench build asan wheel clean
