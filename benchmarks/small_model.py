"""The model that train_step.py and decode.py measure, and the same of torch."""

VOCAB_SIZE, HIDDEN, LAYERS, HEADS, GROUPS, SIZE, FFN = 65024, 512, 4, 8, 2, 64, 1368
# elements of its matrices: the multiply-adds of a token, attention aside; training does them three times
PRODUCTS = VOCAB_SIZE * HIDDEN + LAYERS * HIDDEN * ((HEADS + 2 * GROUPS) * SIZE + HEADS * SIZE + 3 * FFN)
OURS = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "kv_channels": SIZE,
    "ffn_hidden_size": FFN,
    "multi_query_group_num": GROUPS,
    "padded_vocab_size": VOCAB_SIZE,
    "param_init_type": "float32",
    "compute_dtype": "float32",
}  # of GLM32KConfig


def torch_model(positions):
    """transformers' GlmForCausalLM of that size with random weights, for sequences of so many tokens."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    torch.manual_seed(0)
    config = GlmConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=SIZE,
        attn_implementation="sdpa",
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=positions,
        pad_token_id=0,
        eos_token_id=None,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    return GlmForCausalLM(config)
