# The main targets are run and test.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE  # without bytecode every program starts seconds later
unexport PYTHONPATH PYTHONHOME PYTHONSAFEPATH  # of ROS, conda or modules: other packages than those of the lock, or none of ours
# the user's pip.conf may say yes, which fails in .venv (no comment beside the value: its spaces would belong to it)
export PIP_USER := no
# a container's user may have no name, which DVC asks for
export USER := $(or $(USER),$(shell id -un 2>/dev/null || id -u))
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: run repository install test test-images test-services test-cluster test-apiserver faults lint security ui doctor compile images push locks clean

run: repository install  ## the whole pipeline on params.yaml; re-runs only what changed
	@python -m pipelines.optional
	@dvc repro
	@python -m components.summary

repository:            ## DVC needs git, or must be told that there is none; it says only that this is no repository
	@LC_ALL=C git rev-parse 2>&1 | grep -q 'not a git repository' && ! grep -qs 'no_scm = true' .dvc/config .dvc/config.local && { \
		echo "$(CURDIR) is in no git repository (an exported archive?), and DVC works in one. To make it one:"; \
		echo "    git init && git add -A && git commit -m begin"; \
		echo "Without git (no dvc exp, and runs record no commit):"; \
		echo "    make install && .venv/bin/dvc config --local core.no_scm true"; exit 1; } || true
	@for folder in data models metrics; do [ ! -L $$folder ] || grep -qs 'no_scm = true' .dvc/config .dvc/config.local || { \
		echo "$$folder is a link, and DVC refuses results outside of the git repository. Clone onto that disk instead,"; \
		echo "or link only what is read: data/images/train, data/images/val."; exit 1; }; done

install: $(BIN)/.installed .dvc/plots/page.html

.dvc/plots/page.html: components/plotspage.py $(BIN)/.installed
	@$(BIN)/python -m components.plotspage $@

$(BIN)/.installed: requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; set another CPython 3.11 with: make PYTHON=…"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	@touch $@

test: install          ## the whole suite, no network beyond loopback
	@python -m pytest

faults: install        ## the long suite: sharding and training killed at every call, and randomised tests with many cases
	@python -m pytest -m faults
	@VGG_OUTAGES=50 python -m pytest -n 0 tests/components/test_outages.py
	@VGG_KILLS=500 VGG_CORRUPTIONS=20000 VGG_HOSTILE_CASES=10000 \
		python -m pytest tests/runtime/test_survival.py tests/runtime/test_checkpoint.py tests/vgg/test_hostile.py tests/vgg/test_hostile_files.py

test-images: install   ## build the images, run the pipeline in containers; needs root, podman and debootstrap
	@python -m pytest -m images -n 0 tests/security/test_images.py

test-services: install ## the pipeline with PostgreSQL, an S3 store and MLflow as in docker/compose.yaml; root, postgresql
	@python -m pytest -m images -n 0 tests/components/test_services.py

test-cluster: install  ## the cluster of kubectl's context and KF_PIPELINES_ENDPOINT proves itself (docs/cluster.md, 15); ARGS=…
	@python -m pipelines.prove $(ARGS)

test-apiserver: install build/apiserver ## deploy/ and the TrainJob's step against a real API server; Go 1.24, 5 minutes to build
	@python -m pytest -m apiserver -n 0 tests/components/test_apiserver.py

build/apiserver: tests/apiserver/go.mod tests/apiserver/build.sh
	@tests/apiserver/build.sh $@.part && rm -rf $@ && mv $@.part $@

lint: install          ## formatting, lint, types; any finding fails
	@ruff format --check .
	@ruff check .
	@mypy

security: install      ## checks of our code, its dependencies and the deployment
	@bandit -q -ll -c pyproject.toml -r vgg runtime components pipelines benchmarks security
	@python -m security.audit
	@for folder in overlays/gpu components/trainer-gpu; do \
	    kubectl kustomize deploy/$$folder | python -m security.manifests - || exit; done

ui: install            ## the runs in MLflow's pages: serves mlflow.db, prints the address and opens it; PORT=…
	@python -m components.tracking ui $(if $(PORT),--port $(PORT))

doctor:                ## what is wrong here, and its cure; reads only: not even .venv is made
	@[ -x $(BIN)/python ] || { echo "no .venv here. To make it: make install"; exit 78; }
	@python -m components.doctor

compile: install       ## compile the Kubeflow package
	@python -m pipelines.submit --compile build/vgg-imagenet.yaml

images: install        ## build the images of the steps, tagged by content; BASE=… CA=… ENGINE=… VGG_REGISTRY=…
	@python -m pipelines.build $(if $(ENGINE),--engine $(ENGINE)) $(if $(BASE),--base $(BASE)) $(if $(CA),--ca $(CA))

push: install          ## push images that are missing in VGG_REGISTRY
	@python -m pipelines.build --push $(if $(ENGINE),--engine $(ENGINE)) $(if $(BASE),--base $(BASE)) $(if $(CA),--ca $(CA))

locks: install         ## update requirements.lock and the lock file of each image
	@uv pip compile --quiet --extra dev --generate-hashes --no-header --no-emit-index-url --python-version 3.11 \
		pyproject.toml -o requirements.lock
	@cd docker && for target in data train serve; do uv pip compile --quiet --generate-hashes --no-header \
		--no-emit-index-url --python-version 3.11 -c ../requirements.lock $$target.in -o $$target.lock; done

clean:                 ## remove everything that a run creates; keeps .venv
	rm -rf data/shards data/predictions data/predictions.parts data/boxes data/localisations models build .tracking mlflow.db mlruns dvc_plots metrics/register.json metrics/gate.* .dvc/cache .dvc/tmp
