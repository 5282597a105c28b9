"""LongBench: prompts as its own programs build them."""

from mindformers_glm32k.longbench.prompt_ids import WITHOUT_CHAT_FORMAT, build_prompt_ids

__all__ = ["WITHOUT_CHAT_FORMAT", "build_prompt_ids"]
