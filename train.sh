#!/usr/bin/env bash
# Stage 1, stage 2, evaluation in one command. Stopped or killed, the same command goes on where it was.
#   bash train.sh                          the tiny world on a laptop: nine to ten minutes on two cores
#   bash train.sh sd3m 8                   model, processes (GPUs) on this node; further flags go to both stages
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host MASTER_PORT=29500 bash train.sh sd3m 8      on every node, each with its NODE_RANK
#   bash train.sh ablations                the paper's questions on the tiny world, a night; --quick: half an hour
set -euo pipefail
cd "$(dirname "$0")"
case ${1:-} in -h | --help) sed -n '2,6s/^# *//p' train.sh; exit ;; esac

# Environment: an active one is used as it is, else .venv is made once. PYTHON chooses the interpreter that makes it.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if [ ! -e .venv/complete ]; then
        "${PYTHON:-python3}" -m venv .venv
        .venv/bin/python -m pip install --quiet --requirement requirements.txt
        touch .venv/complete
    fi
    . .venv/bin/activate
fi
python -c "import importlib.metadata as m; [m.version(name) for name in ('torch', 'diffusers', 'transformers', 'peft')]" 2>/dev/null || python -m pip install --quiet --requirement requirements.txt

if [ "${1:-}" = ablations ]; then
    shift
    exec python eval.py --ablations "$@"
fi
model=${1:-tiny} processes=${2:-1}
if [[ $model == -* || ! $processes =~ ^[1-9][0-9]*$ || ! ${NNODES:-1} =~ ^[1-9][0-9]*$ ]]; then
    echo "train.sh: give a model, the number of processes, then flags, as in: bash train.sh sd3m 8 --steps 4; NNODES is a number of nodes" >&2
    exit 2
fi
shift $(($# < 2 ? $# : 2))
for word in "$@"; do
    case $word in --out | --out=* | --stage | --stage=* | --model | --model=* | --dry_run | --dry_run=* | -h | --help)
        echo "train.sh: $word is not for both stages: OUT=FOLDER bash train.sh MODEL PROCESSES, or python rtdmd.py $word" >&2
        exit 2 ;;
    esac
done
out=${OUT:-runs/$model}
run=(python)
if [ "$processes" -gt 1 ] || [ "${NNODES:-1}" -gt 1 ]; then
    run=(torchrun --nproc_per_node "$processes" --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}"
         --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}")
fi

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}    # seconds that a signalled stage has to save
trap 'exit 143' TERM                                                            # a signal to this script: no next stage
trap 'exit 130' INT
# torchrun ends with some fifty lines of its own when a process fails: the program's sentence is repeated behind them.
said=$(mktemp)
trap 'rm -f "$said"' EXIT
timed() {
    local start=$SECONDS label=$1
    shift
    if [ "$1" = python ]; then
        "$@"
    else
        "$@" 2> >(tee "$said" >&2) || { code=$?; sleep 1; grep -aE '^(rtdmd|eval): ' "$said" | tail -n 1 >&2; exit "$code"; }
    fi
    echo "$label: $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s"
}
# What stage 2 would refuse, with so many processes, is refused before stage 1 has trained for hours.
[ "$model $# $processes ${NNODES:-1}" = "tiny 0 1 1" ] || WORLD_SIZE=$((processes * ${NNODES:-1})) python -c 'import sys, rtdmd
try:
    rtdmd.resolve(rtdmd.parse_flags(sys.argv[1:]))
except rtdmd.UsageError as error:
    print(f"rtdmd: stage 2: {error}", file=sys.stderr)
    sys.exit(2)' --stage 2 --model "$model" "$@"
for stage in 1 2; do
    timed "stage $stage" "${run[@]}" rtdmd.py --stage $stage --model "$model" --out "$out" "$@"
    # A signal to the program alone ends it with 0, like its last iteration: do not go on from half of a stage.
    python -c 'import json, pathlib, re, sys
stage = pathlib.Path(sys.argv[1])
numbers = [re.fullmatch(r"checkpoint-(\d{6,})", path.name) for path in stage.iterdir()]
reached = max([int(number[1]) for number in numbers if number], default=0)
if reached < json.loads((stage / "run.json").read_text())["config"]["iterations"]:
    sys.exit(f"train.sh: {stage} was stopped: the same command goes on with it.")' "$out/stage$stage"
done
timed "evaluation" "${run[@]}" eval.py --model "$model" --run_folder "$out"
echo "Everything is in $out: report.json, grid.png, trajectory.png, curves.png, training.gif, stage1/, stage2/."
