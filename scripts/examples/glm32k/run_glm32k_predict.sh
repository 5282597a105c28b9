#!/bin/bash
# Answers prompts with a GLM32K checkpoint and prints the answers alone; see `usage`.

usage() {
    cat <<'TEXT'
usage: bash scripts/examples/glm32k/run_glm32k_predict.sh CONFIG_PATH CKPT_PATH TOKENIZER [PROMPT ...]

  CONFIG_PATH  YAML for prediction, e.g. research/glm32k/predict_glm32k.yaml; its model_config.max_new_tokens limits
               the tokens of an answer, whatever the length of the prompt
  CKPT_PATH    checkpoint file, or folder with rank_N subfolders
  TOKENIZER    tokenizer.model
  PROMPT       prompts, or one file with a prompt a line; default: the two of the model card

The prompts are put into the chat format and answered in batches. Answers go to stdout; the log goes to
output/predict/predict.log.
TEXT
}

case ${1:-} in
    -h | --help) usage; exit 0 ;;
esac
if (($# < 3)); then
    usage >&2
    echo "error: CONFIG_PATH, CKPT_PATH and TOKENIZER are needed, got $# arguments" >&2
    exit 2
fi
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$folder/../../.." && pwd)
python=$(command -v python || command -v python3) ||
    { echo "error: no python on PATH; activate the virtual environment first" >&2; exit 2; }
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

config=$1 checkpoint=$2 tokenizer=$3
shift 3
log=output/predict/predict.log
"$python" "$folder/run_glm32k_generate.py" --config_path "$config" --load_checkpoint "$checkpoint" \
    --vocab_file "$tokenizer" --log "$log" -- "$@"
status=$?
if ((status > 128)); then  # killed: nothing had a chance to say so
    echo "error: prediction was killed by signal $((status - 128)) (9: out of memory?); log: $log" >&2
fi
exit "$status"
