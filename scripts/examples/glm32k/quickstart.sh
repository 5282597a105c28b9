#!/bin/bash
# From a machine with nothing but Python to a fine-tuned tiny GLM32K that answers; see `usage`.

usage() {
    cat <<'TEXT'
usage: bash scripts/examples/glm32k/quickstart.sh [OUTPUT_DIR] [--venv DIR]

  OUTPUT_DIR   where data, checkpoint, curve, answers, report and logs go: a new or empty folder, or one of an earlier
               quickstart, whose files are replaced. Default: output/quickstart in the project
  --venv DIR   a virtual environment to use. Default: .venv in the project, made when it is not there; one that is
               there and has everything is used as it is

Python 3.9 to 3.12 with its venv module is needed. PYTHON=/path/to/python3.11 chooses one.
TEXT
}

output="" venv=""
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --venv) [[ -n ${2:-} ]] || { echo "error: --venv needs a folder" >&2; exit 2; }; venv=$2; shift 2 ;;
        -*) usage >&2; echo "error: unknown option $1" >&2; exit 2 ;;
        *) [[ -z $output ]] || { usage >&2; echo "error: one OUTPUT_DIR, got also $1" >&2; exit 2; }
           output=$1; shift ;;
    esac
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
output=${output:-$root/output/quickstart}
# an earlier quickstart's files are replaced, nobody else's
if [[ -e $output && ! -e $output/.quickstart && -n $(ls -A "$output" 2> /dev/null || echo file) ]]; then
    echo "error: $output is not empty and not from an earlier quickstart; give another OUTPUT_DIR" >&2
    exit 2
fi
mkdir -p "$output" && touch "$output/.quickstart" || exit 1
output=$(cd "$output" && pwd)
configs=$root/research/glm32k
data=$output/data logs=$output/logs
mkdir -p "$logs" || exit 1
own=${venv:+no}  # a given environment needs only the packages: the project is found by PYTHONPATH
venv=${venv:-$root/.venv}

STAGES=6
stage=0 begun=$SECONDS
say() { printf '[%3d s] %s\n' $((SECONDS - begun)) "$*"; }
next() { stage=$((stage + 1)); say "$stage/$STAGES $*"; }
fail() {  # MESSAGE [LOG]
    if [[ -s ${2:-} ]]; then
        echo "----- the end of $2 -----" >&2
        grep -v '^\[INFO\] ' "$2" | tail -n 15 >&2
    fi
    echo "error: stage $stage/$STAGES: $1${2:+; log: $2}" >&2
    exit 1
}

# ---- 1: virtual environment
next "virtual environment: $venv"
if [[ ! -x $venv/bin/python ]]; then
    [[ ! -e $venv ]] || [[ -d $venv && -z $(ls -A "$venv") ]] ||
        fail "$venv has no bin/python and is not empty; remove it or give another --venv"
    usable='import sys, venv, ensurepip; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))'
    python=""
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.10 python3.9 python3 python; do
        command -v "$candidate" > /dev/null && "$candidate" -c "$usable" 2> /dev/null && { python=$candidate; break; }
    done
    [[ -n $python ]] || fail "no Python 3.9 to 3.12 with venv found (on Debian: apt install python3-venv)"
    "$python" -m venv "$venv" > "$logs/venv.log" 2>&1 || fail "cannot make it with $python" "$logs/venv.log"
fi
venv=$(cd "$venv" && pwd)  # stages run in folders of their own
export PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# ---- 2: packages
has_all='import importlib.util as u, sys
sys.exit(any(u.find_spec(name) is None for name in "mindspore mindformers sentencepiece matplotlib pytest".split()))'
if python -c "$has_all" && [[ $own == no || -x $venv/bin/glm32k ]]; then
    next "packages: all there"
else
    next "packages: downloading and installing MindSpore, MindFormers and what they need (3.2 GB on disk) …"
    python -m pip install -e "$root[test]" > "$logs/install.log" 2>&1 || fail "pip install" "$logs/install.log"
fi
pair=$(python -c 'from importlib.metadata import version as v
print("MindFormers", v("mindformers"), "on MindSpore", v("mindspore"))') || fail "the installation is not complete"
say "    $pair"

# ---- 3: data
next "data: a small vocabulary and key-value retrieval tasks in the LongBench layout"
python -m mindformers_glm32k.cli make-data --output_dir "$data" > "$logs/make_data.log" 2>&1 ||
    fail "make-data" "$logs/make_data.log"
only() {  # PATTERN: the one file of the data that matches
    local found=("$data"/$1)
    [[ ${#found[@]} -eq 1 && -s ${found[0]} ]] || fail "$data/$1: one file expected" "$logs/make_data.log"
    echo "${found[0]}"
}
train=$(only '*train*.jsonl') || exit 1
held_out=$(only '*eval*.jsonl') || exit 1
vocabulary=$(only 'tokenizer.model') || exit 1
say "    $(wc -l < "$train") records to train on, $(wc -l < "$held_out") held out: $data"

# ---- 4: fine-tuning
next "fine-tuning finetune_glm32k_tiny_cpu.yaml"
log=$logs/finetune.log
rm -rf "$output/checkpoint" "$output"/loss_curve.*
cd "$output" || exit 1  # what MindFormers writes into the current folder
python -m mindformers_glm32k.run_mindformer --config "$configs/finetune_glm32k_tiny_cpu.yaml" --run_mode finetune \
    --train_dataset_dir "$train" --train_dataset.tokenizer.vocab_file "$vocabulary" --output_dir "$output" \
    > "$log" 2>&1 < /dev/null &
training=$!
trap 'kill "$training" 2> /dev/null; exit 130' INT TERM
progress='s/.*Epoch:\[ *\([0-9]*\)\/ *\([0-9]*\)\], step:\[ *\([0-9]*\)\/ *\([0-9]*\)\], loss:\[*\([0-9.]*\).*/'
progress+='epoch \1 of \2, step \3 of \4: loss \5/p'
shown="" last=$SECONDS
while kill -0 "$training" 2> /dev/null; do
    sleep 1
    if ((SECONDS - last >= 10)); then
        now=$(grep -a 'Epoch:\[' "$log" | tail -n 1 | sed -n "$progress")
        [[ -n $now && $now != "$shown" ]] && { say "    $now"; shown=$now; }
        last=$SECONDS
    fi
done
wait "$training" || fail "fine-tuning" "$log"
trap - INT TERM
say "    $(sed -n 's/.*INFO - training: \(.*\); curve: .*/\1/p' "$log" | tail -n 1)"
checkpoint=$(ls -t "$output"/checkpoint/rank_0/*.ckpt 2> /dev/null | head -n 1)
[[ -s $checkpoint ]] || fail "fine-tuning left no checkpoint" "$log"
[[ -s $output/loss_curve.png ]] || fail "fine-tuning left no loss curve" "$log"

# ---- 5: prediction, by two processes at a time
next "answers to held-out questions, before and after the fine-tuning"
rm -rf "$output/longbench" "$output"/answers.txt
predict() {  # NAME [CHECKPOINT]; random weights without one
    mkdir -p "$output/longbench/$1" && cd "$output/longbench/$1" || exit 1  # what MindFormers writes
    exec python -m mindformers_glm32k longbench predict --config "$configs/predict_glm32k_tiny_cpu.yaml" \
        ${2:+--load_checkpoint "$2"} --data "$held_out" --prompt_config_file "$data/dataset2prompt.json" \
        --tokenizer "$vocabulary" --output_dir "$output/longbench/$1" --max_new_tokens 16 --batch_size 4 \
        > "$logs/predict_$1.log" 2>&1 < /dev/null
}
(predict base) &
base=$!
(predict fine-tuned "$checkpoint") || fail "prediction" "$logs/predict_fine-tuned.log"
wait "$base" || fail "prediction before the fine-tuning" "$logs/predict_base.log"
python - "$held_out" "$output/longbench/fine-tuned/kv_retrieval.jsonl" "$output/answers.txt" <<'PYTHON' ||
import json
import sys

with open(sys.argv[1], encoding="utf-8") as records:
    wanted = {record["_id"]: record["summary"] for record in map(json.loads, records)}
with open(sys.argv[2], encoding="utf-8") as lines:
    found = {row["_id"]: row["pred"].strip().replace("\n", r"\n") for row in map(json.loads, lines)}
if set(found) != set(wanted):
    sys.exit(f"{len(found)} answers to {len(wanted)} questions")
with open(sys.argv[3], "w", encoding="utf-8") as answers:
    print(*(found[key] for key in wanted), sep="\n", file=answers)
for key in list(wanted)[:5]:
    print(f"            wanted {wanted[key].strip()!r}, answered {found[key]!r}")
right = sum(wanted[key].strip() == found[key] for key in wanted)
print(f"            {right} of {len(wanted)} held-out answers are right")
PYTHON
    fail "the answers do not fit the questions"

# ---- 6: report
next "scores and report: the fine-tuned model beside the one before"
python -m mindformers_glm32k longbench report --predictions "$output/longbench/fine-tuned" \
    --compare "$output/longbench/base" --data "$held_out" --report_dir "$output" > "$logs/report.log" 2>&1 ||
    fail "report" "$logs/report.log"
sed -n '3s/^/            /p' "$output/report.md"

cat <<TEXT

done in $((SECONDS - begun)) s
  checkpoint  $checkpoint
  loss curve  $output/loss_curve.png, $output/loss_curve.csv
  answers     $output/answers.txt (questions: $held_out)
  report      $output/report.html (open it in a browser), $output/report.md
  logs        $logs

ask it yourself:  . $venv/bin/activate
                  bash $root/scripts/examples/glm32k/run_glm32k_predict.sh \\
                      $configs/predict_glm32k_tiny_cpu.yaml \\
                      $checkpoint \\
                      $vocabulary "YOUR QUESTION"
run the tests:    cd $root && $venv/bin/python -m pytest -n 2 --dist loadfile
TEXT
