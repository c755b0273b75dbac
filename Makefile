# Everything runs from a fresh clone; the virtual environments are made once and again when their pins change.
PYTHON ?= python3
PYTEST_WORKERS ?= 2

# One thread in each process: the tests run in parallel, and benchmarks compare like with like.
export OMP_NUM_THREADS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test check docs bench bench-jax bench-posteriors bench-svi wheel-test clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/made ## fit a flow posterior to the centred eight schools, print its table, draw pictures in demo/
	.venv/bin/python examples/eight_schools.py --output demo

test: check ## check, then all tests, doctests and examples in smoke mode
	.venv/bin/pytest -q -n $(PYTEST_WORKERS)

check: .venv/made ## ruff, ruff format --check and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/made ## build the documentation in docs/_build/html; a warning is an error
	.venv/bin/sphinx-build -q -W --keep-going docs docs/_build/html

bench: .venv-bench/made ## speed and density against the torch peers (zuko, nflows, normflows, Pyro)
	.venv-bench/bin/python -m benchmarks
	.venv-bench/bin/python -m benchmarks.density --json benchmarks/density.json --markdown docs/benchmarks_density.md

bench-jax: .venv-jax/made ## speed against the JAX peers (flowjax, numpyro)
	.venv-jax/bin/python -m benchmarks.jax_peers

bench-posteriors: .venv/made ## posteriors against Pyro's guides and NUTS, on references and exact targets
	.venv/bin/python -m benchmarks.posterior_costs --json benchmarks/posterior_costs.json
	.venv/bin/python -m benchmarks.posteriors --out benchmarks/posteriors.json --costs benchmarks/posterior_costs.json --markdown docs/benchmarks_posteriors.md

bench-svi: .venv/made ## the guide in plain SVI against Pyro's guides at equal steps
	.venv/bin/python -m benchmarks.plain_svi

wheel-test: .venv/made ## build the wheel, install it in an empty environment and import it
	rm -rf build/wheel-test
	.venv/bin/python -m build --wheel --no-isolation --outdir build/wheel-test
	$(PYTHON) -m venv build/wheel-test/venv
	build/wheel-test/venv/bin/pip install --quiet -c constraints.txt torch
	build/wheel-test/venv/bin/pip install --quiet -c constraints.txt build/wheel-test/*.whl
	cd build/wheel-test && venv/bin/python -c "import pyro_nf; print('pyro_nf', pyro_nf.__version__, 'imports from', pyro_nf.__file__)"

clean: ## remove the environments and everything that was built
	rm -rf .venv .venv-bench .venv-jax build dist demo docs/_build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/made: PACKAGES = -e '.[fast,plots,dev,docs]'
.venv-bench/made: PACKAGES = -e '.[fast,plots]' -r benchmarks/requirements.txt
.venv-jax/made: PACKAGES = -e '.[fast]' -r benchmarks/requirements-jax.txt
.venv-bench/made: benchmarks/requirements.txt
.venv-jax/made: benchmarks/requirements-jax.txt

# torch first and alone, so that pip settles its build before other packages ask for it;
# then hatchling, so that pyro_nf itself is built by the pinned one.
.venv/made .venv-bench/made .venv-jax/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -c constraints.txt torch
	$(@D)/bin/pip install --quiet -c constraints.txt hatchling editables
	$(@D)/bin/pip install --quiet -c constraints.txt --no-build-isolation $(PACKAGES)
	touch $@
