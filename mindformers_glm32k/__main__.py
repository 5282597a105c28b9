"""`python -m mindformers_glm32k COMMAND`, the same as `glm32k COMMAND`."""

import sys

from mindformers_glm32k.cli import main

sys.exit(main())
