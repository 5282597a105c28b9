"""`python -m mindformers_glm32k.weights.convert`: the command's name before it was `glm32k convert`."""

import os
import sys

if __name__ == "__main__":  # hands the process over: the command stands above this room and is not imported from it
    os.execv(sys.executable, [sys.executable, "-m", "mindformers_glm32k", "convert", *sys.argv[1:]])
