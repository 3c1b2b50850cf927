# Every target only wraps ordinary commands; the README shows them.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/

.PHONY: demo test test-slow coverage docs lint types install benchmark clean

install: $(VENV)/.installed ## make the environment

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet -r requirements.txt
	$(RUN)python -m pip install --quiet -e '.[dev]'
	touch $@

demo: install ## distil real digits to one image per class and train unseen architectures on them
	rm -rf runs/demo
	$(RUN)lightning-dd fit --config configs/mnist5k/frepo.yaml --config configs/demo.yaml
	$(RUN)lightning-dd evaluate runs/demo/distil/best.safetensors \
		--config configs/evaluate/mnist5k.yaml --output runs/demo/report
	@echo "pictures: runs/demo/distil/initial.png, final.png, labels.png"
	@echo "TensorBoard: $(RUN)tensorboard --logdir runs/demo"

test: install lint types ## what CI runs
	$(RUN)python -m pytest -n 2 --dist worksteal

test-slow: install ## minutes rather than seconds: real CIFAR-10, subprocesses
	$(RUN)python -m pytest -m slow

coverage: install ## which lines of the package no test runs
	$(RUN)python -m pytest -n 2 --dist worksteal --cov=lightning_dd --cov-report=json:runs/coverage.json
	$(RUN)python benchmarks/line_coverage.py runs/coverage.json
	$(RUN)python benchmarks/tables.py

lint: install
	$(RUN)ruff check .
	$(RUN)ruff format --check .

types: install
	$(RUN)mypy

docs: install ## these pages and the reference as one folder of HTML, site/index.html
	$(RUN)python -m pip install --quiet -e '.[docs]'
	$(RUN)python -m sphinx -b html -W --keep-going docs site

benchmark: install ## time the FRePo outer + inner step
	$(RUN)python benchmarks/frepo_step.py

clean:
	rm -rf runs site docs/reference .mypy_cache .ruff_cache .pytest_cache
