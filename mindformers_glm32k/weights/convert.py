"""`python -m mindformers_glm32k.weights.convert`: the command's name before it was `glm32k convert`."""

import os
import sys

if __name__ == "__main__":  # not an import: in the import order commands stand above weights
    os.execv(sys.executable, [sys.executable, "-m", "mindformers_glm32k", "convert", *sys.argv[1:]])
