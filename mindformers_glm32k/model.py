"""GLM32KForConditionalGeneration: upstream's glm2 stack, with a backbone that keeps no S x S tensor.

Legend: B batch, S tokens of a sequence, T tokens of a call, H hidden size, D features of a head, V padded vocabulary,
K documents that a packed sequence has room for.
"""

from __future__ import annotations

import inspect

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.models.glm2.glm2 import (
    ChatGLM2ForConditionalGeneration,
    ChatGLM2Transformer,
    FreqsMgr,
    GLM2PreTrainedModel,
    GLMEmbedding,
    Linear,
    LowerTriangularMaskWithDynamic,
)
from mindformers.version_control import get_dropout
from mindspore import Layout, Tensor, ops
from mindspore.ops import operations as P

from mindformers_glm32k import compat
from mindformers_glm32k.config import GLM32KConfig
from mindformers_glm32k.generator import PortableGenerator
from mindformers_glm32k.kernels.ascend.flash_attention import DocumentEnds, compressed_causal_mask
from mindformers_glm32k.kernels.cpu.blocks import arange
from mindformers_glm32k.kernels.cpu.cached_steps import CachedSteps
from mindformers_glm32k.kernels.cpu.tiled_layers import TiledTransformer, can_tile
from mindformers_glm32k.kernels.loss import ChunkedLoss
from mindformers_glm32k.kernels.mask import differs, hides
from mindformers_glm32k.kernels.substitution import cells_for, replace_splits
from mindformers_glm32k.parallel import data_parallel_devices


class GLM32KModel(GLM2PreTrainedModel):
    """Embedding, rotary tables, upstream's ChatGLM2Transformer and output layer under upstream's parameter names.

    Upstream's ChatGLM2Model stores two S x S masks when constructed (8.6 GB at 32768 tokens); this one stores none.
    """

    config_class = GLM32KConfig

    def __init__(self, config: GLM32KConfig):
        super().__init__(config)
        parallel = config.parallel_config
        data, context, model = parallel.data_parallel, parallel.context_parallel, parallel.model_parallel
        self.seq_length = config.seq_length
        self.use_past = config.use_past
        self.use_flash_attention = config.use_flash_attention
        self.portable = config.use_portable_cells
        self.mask_dtype = config.compute_dtype
        self.is_first_iteration = True
        self.embedding = GLMEmbedding(
            vocab_table_size=config.vocab_size,
            embedding_size=config.hidden_size,
            param_init_type=config.param_init_type,
            parallel_optimizer=True,
        )
        self.freqs_mgr = FreqsMgr(
            dim=config.kv_channels // 2,
            seq_length=config.seq_length,
            rotary_dtype=config.rotary_dtype,
            base=10000,
            rope_ratio=config.rope_ratio,
            parallel_config=parallel,
        )
        self.tiled = can_tile(config)
        self.encoder = (
            TiledTransformer(config, self.freqs_mgr.freqs_cos, self.freqs_mgr.freqs_sin)
            if self.tiled
            else ChatGLM2Transformer(config)
        )
        self.output_layer = Linear(
            config.hidden_size,
            config.vocab_size,
            has_bias=False,
            param_init_type=config.param_init_type,
            compute_dtype=config.compute_dtype,
        )
        self._shard(parallel)
        self.dropout = get_dropout(config.hidden_dropout)
        tokens = context * model if parallel.use_seq_parallel else context
        self.dropout.dropout.shard(((data, tokens, 1),))
        self.gather = P.Gather()
        self.gather_positions = P.Gather().shard(((1, 1), (data, context)))
        self.across_heads = P.ExpandDims().shard(((data, context, 1),))
        if self.portable:
            replace_splits(self.encoder)
        elif self.use_past:
            self.casual_mask = LowerTriangularMaskWithDynamic(
                seq_length=config.seq_length,
                batch_size=config.batch_size * data,
                compute_type=config.compute_dtype,
                is_dynamic=config.is_dynamic,
                pad_token_id=config.pad_token_id,
                use_flash_attention=config.use_flash_attention,
                use_past=True,
            )
        elif self.use_flash_attention:
            self.compressed_mask = compressed_causal_mask()
            self.document_ends = DocumentEnds(config.documents_per_row + 1, data)  # room for padding, too

    def _shard(self, parallel):
        """Tokens over dp x cp everywhere, the vocabulary of the output layer over mp, the residual along the sequence.

        Upstream splits the output layer over all ranks of a stage unless vocab_emb_dp is set, and so gathers the
        hidden states of every micro batch over dp; and it leaves the residual of context parallel ranks whole.
        """
        data, context, model = parallel.data_parallel, parallel.context_parallel, parallel.model_parallel
        tokens = context * model if parallel.use_seq_parallel else context
        vocabulary = model if self.config.vocab_size % model == 0 else 1
        self.output_layer.shard(strategy_matmul=((data * context, 1), (vocabulary, 1)))
        self.embedding.gather.shard(((1, 1), (data, context)))
        heads = "mp" if self.config.multi_query_group_num % model == 0 else "None"
        repeated = Layout((data, context, model), ("dp", "cp", "mp"))("dp", heads, "None", "cp")
        for layer in self.encoder.layers:
            # without a strategy the compiler splits tokens over mp and gathers them again, in every layer
            layer.add.shard(((data, tokens, 1), (data, tokens, 1)))
            # the repetition of key-value heads, which upstream shards for one layout of eight ranks only
            layer.self_attention.tile_kv.shard((repeated,), (repeated,))
            if self.use_flash_attention and not self.portable:
                exchanged = parallel.get_ulysses_cp_num()  # Ulysses repeats key-value heads where ranks outnumber them
                groups = self.config.multi_query_group_num
                key_heads = min(groups, model) if exchanged == 1 else model * exchanged
                layer.self_attention.flash_attention.shard_packed(data, model * exchanged, key_heads)
        self.embedding.pipeline_stage = 0
        if parallel.pipeline_stage > 1:
            self.embedding.set_comm_fusion(2)
            self.output_layer.pipeline_stage = parallel.pipeline_stage - 1
        else:
            self.embedding.set_comm_fusion(parallel.gradient_aggregation_group)

    def construct(
        self,
        input_ids,
        batch_valid_length=None,
        block_tables=None,
        slot_mapping=None,
        prefix_key_values=None,
        position_ids=None,
        document_ids=None,
    ):
        """Hidden states of the last layer after the final norm: shape of input_ids + (H,), compute dtype.

        Inputs:
            input_ids (Tensor): (B, S); with use_past, prefill (1, T) and decode (B, 1), int32.
            position_ids, document_ids (Tensor): (B, S) int32, of packed sequences; without use_past.
            batch_valid_length (Tensor): (B,) tokens of each prompt so far, with use_past.
            block_tables (Tensor): (B, blocks), slot_mapping (Tensor): (T,) or (B,): with use_past, see PagedAttention.
        """
        if self.tiled:
            if position_ids is None:
                position_ids = ops.broadcast_to(arange(input_ids.shape[1]), input_ids.shape)
            hidden = self.dropout(self.embedding(input_ids))
            return self.encoder(hidden, document_ids, position_ids)
        if self.use_past:
            if self.portable:
                rotary, mask = self._rotary_of_tokens(position_ids), position_ids
            elif self.is_first_iteration:
                rotary, mask = self.freqs_mgr.prefill(), self.casual_mask.prefill()
            else:
                rotary, mask = self.freqs_mgr.increment(batch_valid_length), None
        else:
            rotary, mask = self._rotary(input_ids, position_ids), self._causal_mask(input_ids, document_ids)
        hidden = self.dropout(self.embedding(input_ids))
        return self.encoder(
            hidden,
            mask,
            rotary,
            batch_valid_length=batch_valid_length,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            prefix_key_values=prefix_key_values,
        )

    def _rotary(self, input_ids, position_ids):
        """Rotary factors (S, D), or (B, 1, S, D) where every sequence has its own positions."""
        if position_ids is None:
            return self.freqs_mgr(input_ids.shape[1])
        cos = self.across_heads(self.gather_positions(self.freqs_mgr.freqs_cos, position_ids, 0), 1)
        sin = self.across_heads(self.gather_positions(self.freqs_mgr.freqs_sin, position_ids, 0), 1)
        return cos, sin, sin

    def _causal_mask(self, input_ids, document_ids):
        """The mask that this configuration's attention takes: document ids or None (portable flash attention), the
        compressed mask and, with documents, their ends, or (B, 1, S, S) of 0 and 1 (hidden)."""
        if self.use_flash_attention:
            if self.portable:
                return document_ids
            if document_ids is None:
                return self.compressed_mask
            return self.compressed_mask, self.document_ends(document_ids)
        batch, length = input_ids.shape
        position = ops.arange(length)
        mask = hides(position, position).reshape((1, 1, length, length))  # (1, 1, S, S)
        if document_ids is None:
            mask = ops.tile(mask, (batch, 1, 1, 1))
        else:
            mask = ops.logical_or(mask, ops.expand_dims(differs(document_ids, document_ids), 1))
        return ops.cast(mask, self.mask_dtype)

    def _rotary_of_tokens(self, position_ids):
        """Rotary factors (B*S, 1, D) of the tokens of a call of PagedAttention."""
        position = position_ids.reshape((-1,))
        cos = ops.expand_dims(self.gather(self.freqs_mgr.freqs_cos, position, 0), 1)
        sin = ops.expand_dims(self.gather(self.freqs_mgr.freqs_sin, position, 0), 1)
        return cos, sin, sin


class GLM32KForConditionalGeneration(PortableGenerator, ChatGLM2ForConditionalGeneration):
    """ChatGLM3-6B-32K for training, evaluation and prediction.

    Inputs:
        input_ids (Tensor): (B, S) int32; with use_past as upstream's generator passes it.
        labels (Tensor): (B, S) int32, labels[i] is the token that position i predicts, -100 is ignored.
        input_mask (Tensor): (B, S) float32 weight of each position in the loss; by default 1 where labels != -100.
        position_ids (Tensor): (B, S) int32 in [0, seq_length), the position that each token is rotated to; by default
            0, 1, 2, … along the sequence. Without use_past.
        document_ids (Tensor): (B, S) int32, for sequences of several documents: a token sees earlier tokens of its own
            document only (padding has an id of its own); by default a sequence is one document. On Ascend with flash
            attention ids rise along the sequence from 0, and none is above documents_per_row. Without use_past.
        batch_valid_length (Tensor): (B,) or (1, B) int32 tokens of each prompt.
        block_tables, slot_mapping (Tensor): see PagedAttention; with use_past.
        Others are upstream's, accepted and unused.

    Outputs:
        - training with labels: Tensor (), the mean loss over the tokens of all devices that hold a part of the batch;
          where the train step splits it into micro batches, a micro batch's part of the step's mean;
        - evaluation with labels: logits (B, S+1, V), labels (B, S+1) and input_mask (B, S+1), shifted as upstream's
          PerplexityMetric undoes it;
        - without labels: (logits,), float32: (B*S, V), or with use_past or batch_valid_length (B, V), the last token of
          each prompt.
    """

    config_class = GLM32KConfig
    _support_list = []

    def __init__(self, config: GLM32KConfig, **kwargs):
        compat.check_buildable(config)
        with cells_for(config, GLM32KModel):
            # upstream's lazy_inline decorator finds `config` among keyword arguments only
            super().__init__(config=config, **kwargs)
        if config.use_portable_cells:
            self.argmax = compat.portable_argmax
            self.steps = CachedSteps(self.transformer, config) if config.use_past else None
        self.loss = ChunkedLoss(config)
        # evaluated at compile time: LoRA adapters are attached after construction
        self.loss_mode = ops.constexpr(lambda: self.loss.mode(self.transformer.output_layer), reuse_result=False)
        self.transformer.output_layer.recompute()  # see ChunkedLoss: keeps the chunks' weight gradients apart
        self.per_token = getattr(config, "calculate_per_token_loss", False)
        self.weights_are_normalized = False  # set by a train step that divides the loss weights by their total
        self.devices = data_parallel_devices()
        if self.devices > 1:
            self.sum_over_devices = P.AllReduce()

    def construct(
        self,
        input_ids=None,
        labels=None,
        input_mask=None,
        position_ids=None,
        document_ids=None,
        input_embeds=None,
        init_reset=None,
        batch_valid_length=None,
        prefix_key_values=None,
        block_tables=None,
        slot_mapping=None,
        batch_index=None,
        zactivate_len=None,
        attention_mask=None,
        input_position=None,
    ):
        if batch_valid_length is not None:
            batch_valid_length = batch_valid_length.reshape((-1,))
        hidden = self.transformer(
            input_ids, batch_valid_length, block_tables, slot_mapping, prefix_key_values, position_ids, document_ids
        )
        if self.use_past and self.is_first_iteration:
            # (1, T, H) -> (1, B, H): the last token of each prompt
            hidden = self.gather(hidden, ops.cumsum(batch_valid_length, 0) - 1, 1)
        elif labels is None and batch_valid_length is not None and not self.use_past:
            # (B, S, H) -> (B, H): the last token of each prompt
            batch, length, width = hidden.shape
            last = batch_valid_length - 1 + arange(batch) * length
            hidden = self.gather(hidden.reshape((-1, width)), last, 0)  # (B*S, H) -> (B, H)
        if labels is not None and input_mask is None:
            input_mask = ops.cast(self.not_equal(labels, -100), mstype.float32)
        if labels is not None and self.training:
            return self._loss(hidden, labels, input_mask)
        logits = ops.cast(self.transformer.output_layer(hidden), mstype.float32)
        if labels is None:
            return (logits.reshape((-1, self.vocab_size)),)
        return self._shifted(logits, labels, input_mask)

    def _loss(self, hidden, labels, input_mask):
        total, count = self.loss(self.transformer.output_layer, hidden, labels, input_mask, self.loss_mode())
        if self.per_token:
            return total, count
        if self.weights_are_normalized:
            return total
        if self.devices > 1:
            # The gradients are averaged over devices afterwards: dividing by the mean count makes that average the
            # gradient of the mean over all tokens, however unevenly devices hold them.
            count = self.sum_over_devices(ops.stop_gradient(count).reshape((1,)))[0] / self.devices
        return total / count

    def _shifted(self, logits, labels, input_mask):
        """One more token at the end of the logits (B, S, V) and at the start of labels and mask (B, S)."""
        batch = labels.shape[0]
        logits = ops.cat((logits, ops.zeros((batch, 1, self.vocab_size), mstype.float32)), 1)
        labels = ops.cat((ops.zeros((batch, 1), labels.dtype), labels), 1)
        input_mask = ops.cat((ops.zeros((batch, 1), mstype.float32), input_mask), 1)
        return logits, labels, input_mask

    def set_dynamic_inputs(self, **kwargs) -> None:
        """Upstream's, with an entry for every argument of construct; CachedSteps have shapes of their own."""
        if self.steps is not None:
            return
        inputs = dict.fromkeys(inspect.signature(self.construct).parameters)
        inputs["input_ids"] = Tensor(shape=[None, None], dtype=mstype.int32)
        if self.use_past:
            inputs["batch_valid_length"] = Tensor(shape=[None, None], dtype=mstype.int32)
            inputs["block_tables"] = Tensor(shape=[None, None], dtype=mstype.int32)
            inputs["slot_mapping"] = Tensor(shape=[None], dtype=mstype.int32)
        self.set_inputs(*inputs.values())

    def prepare_inputs_for_generation(self, input_ids: np.ndarray, **kwargs) -> dict[str, Tensor]:
        """Upstream's inputs; on portable cells without a cache also lengths: only last tokens need logits."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not self.use_past and self.config.use_portable_cells:
            lengths = np.asarray(kwargs["valid_length_each_example"], np.int32)
            inputs["batch_valid_length"] = Tensor.from_numpy(lengths)
        return inputs
