"""GLM32KTrainer: upstream's causal language modeling trainer, which checks its inputs before it starts."""

from __future__ import annotations

import copy

from mindformers.models.build_tokenizer import build_tokenizer
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer import CausalLanguageModelingTrainer
from mindspore import nn
from mindspore.dataset import Dataset

from mindformers_glm32k import compat
from mindformers_glm32k.data.dataset import check_vocabulary
from mindformers_glm32k.data.packing import COLUMNS as PACKED_COLUMNS
from mindformers_glm32k.errors import InputError
from mindformers_glm32k.files import atomic_path
from mindformers_glm32k.generation.prompts import ChatPromptTokenizer
from mindformers_glm32k.generation.questions import read_prompts
from mindformers_glm32k.overrides import normalize_values
from mindformers_glm32k.parallel import one_program, pipeline_stages
from mindformers_glm32k.preflight import check_checkpoint, check_config, check_dataset, check_packing, check_run_layout
from mindformers_glm32k.tokenizer import GLM32KTokenizer
from mindformers_glm32k.training.perplexity import evaluate_all_records, weigh_by_tokens
from mindformers_glm32k.training.resume import (
    check_continuation,
    complete_callbacks,
    restore_scale_window,
    resumed_file,
)
from mindformers_glm32k.training.stop import STOP_SIGNALS, hold_output_folder
from mindformers_glm32k.training.wrappers import innermost_network
from mindformers_glm32k.weights import checkpoint_to_load


class GLM32KTrainer(CausalLanguageModelingTrainer):
    """Training, evaluation and prediction of GLM32K from a MindFormers configuration.

    Before the run starts it converts YAML's strings such as 1e-5 and None, and refuses with an InputError values of
    a wrong type, a vocabulary that does not fit the model, sequences longer than seq_length, and a checkpoint with
    missing, extra or misshapen parameters. Prediction puts prompts into the chat format and returns answers only.
    """

    def train(self, config: MindFormerConfig | None = None, **kwargs) -> None:
        _prepare(config, "train", _built(kwargs, "train_dataset"))
        if kwargs.get("dataset") is None:
            check_dataset(config, "train_dataset")
        if config.do_eval and kwargs.get("eval_dataset") is None:
            check_dataset(config, "eval_dataset")
        if config.do_eval:
            evaluate_all_records(config)
        _name_columns(config, ["train_dataset", "eval_dataset"] if config.do_eval else ["train_dataset"])
        with hold_output_folder(config.output_dir), compat.barrier_on_cpu():
            try:
                super().train(config=config, **kwargs)
            finally:
                STOP_SIGNALS.restore()
        if STOP_SIGNALS.exit_status():
            raise SystemExit(STOP_SIGNALS.exit_status())

    def evaluate(self, config: MindFormerConfig | None = None, **kwargs) -> None:
        _prepare(config, "eval", _built(kwargs, "eval_dataset"))
        if kwargs.get("dataset") is None:
            check_dataset(config, "eval_dataset")
        evaluate_all_records(config)
        _name_columns(config, ["eval_dataset"])
        with compat.barrier_on_cpu():
            super().evaluate(config=config, **kwargs)

    def predict(
        self,
        config: MindFormerConfig | None = None,
        input_data: str | list[str] | None = None,
        network: nn.Cell | None = None,
        tokenizer: GLM32KTokenizer | None = None,
        batch_size: int | None = None,
        **kwargs,
    ) -> list[dict]:
        """Answers prompts, or a file with one per line: input_data, by default config.input_data.

        Network and tokenizer are built from the configuration by default. Returns upstream's
        {"text_generation_text": [answers]}, one per batch, or in 1.6 one per prompt.
        """
        _prepare(config, "predict", () if tokenizer is None else ("processor",))
        prompts = read_prompts(config.input_data if input_data is None else input_data)
        model = config.model.model_config
        tokenizer = tokenizer or build_tokenizer(copy.deepcopy(config.processor.tokenizer))
        check_vocabulary(tokenizer, model.padded_vocab_size)
        model.eos_token_id = tokenizer.stop_token_ids
        answer_tokens = model.max_new_tokens or 1
        if answer_tokens >= model.seq_length:
            raise InputError(
                f"model_config.max_new_tokens={answer_tokens}: no room for a prompt in "
                f"seq_length={model.seq_length}; lower the one or raise the other"
            )
        chat = ChatPromptTokenizer(tokenizer.vocab_file, longest_prompt=model.seq_length - answer_tokens)
        batch_size = batch_size or (model.batch_size if model.use_past else None) or 1
        missing = -len(prompts) % batch_size  # upstream's pipeline takes whole batches only
        with compat.barrier_on_cpu():
            results = self.predict_process(
                config=config,
                input_data=prompts + prompts[-1:] * missing,
                task=self.task,
                network=network,
                tokenizer=chat,
                batch_size=batch_size,
                **{key: kwargs[key] for key in ("is_full_config",) if key in kwargs},
            )
        if missing:
            for _ in range(missing):
                results[-1]["text_generation_text"].pop()
                if not results[-1]["text_generation_text"]:  # 1.6 has one entry per prompt
                    results.pop()
            # upstream's file has the answers to the padding prompts, too
            with atomic_path(config.save_file or f"{self.task}_result.txt") as temporary:
                temporary.write_text(str(results), encoding="utf-8")
        answers = [answer for result in results for answer in result["text_generation_text"]]
        for prompt, answer in zip(prompts, answers):
            logger.info("prompt: %s\nanswer: %s", prompt, answer)
        return results

    def _reset_wrapper_for_pipeline_parallel(self):
        self._keep_our_step(super()._reset_wrapper_for_pipeline_parallel)

    def _reset_wrapper_for_grad_accu(self, gradient_accumulation_steps):
        self._keep_our_step(super()._reset_wrapper_for_grad_accu, gradient_accumulation_steps)

    def _check_grad_accumulation_steps(self):
        """Upstream's check, which allows accumulation in the semi-automatic modes alone: the plugin's step does it on
        one device and in data parallel, too."""
        runner, step = self.config.runner_config, self.config.runner_wrapper
        wanted = runner.gradient_accumulation_steps
        super()._check_grad_accumulation_steps()
        if not one_program() and step is not None and step.type == "GLM32KTrainOneStepCell":
            runner.gradient_accumulation_steps = wanted or 1

    def _keep_our_step(self, choose, *args):
        """Upstream's choice of the train step that splits a batch, with the plugin's step in place of upstream's."""
        step = self.config.runner_wrapper
        ours = step is not None and step.type in ("GLM32KTrainOneStepCell", "GLM32KPipelineTrainOneStepCell")
        choose(*args)
        if ours:
            step.type = "GLM32KPipelineTrainOneStepCell"

    def create_metrics(self, *args: str, **kwargs: str) -> dict:
        self.compute_metrics = weigh_by_tokens(super().create_metrics(*args, **kwargs))
        return self.compute_metrics

    def create_train_dataset(self, default_args: dict | None = None) -> Dataset:
        dataset = super().create_train_dataset(default_args)
        check_continuation(self.config, dataset.get_dataset_size(), self.global_batch_size)
        return dataset

    def create_model_wrapper(self, network: nn.Cell, optimizer: nn.Optimizer) -> nn.Cell:
        complete_callbacks(self.config, self.global_batch_size)
        step = super().create_model_wrapper(network, optimizer)
        restore_scale_window(self.config, step)
        return step

    def create_network(self, default_args: dict | None = None) -> nn.Cell:
        accumulates = self.config.runner_config.gradient_accumulation_steps not in (None, 1)
        if pipeline_stages() == 1 and not (accumulates and one_program()):
            # Behind an inlined cell the compiler no longer finds the parameters of which several devices hold copies,
            # and counts each copy in the gradient's norm. MindFormers 1.8 and 1.9 switch it off themselves.
            self.config.model.model_config.disable_lazy_inline = True
        network = super().create_network(default_args)
        model = innermost_network(network)
        if model.config.use_past:
            # Upstream's LoRA wrapper declares its inputs' shapes as dynamic in another model's order, and so answers
            # every prompt with the graph of the first. The model inside has the adapters, too.
            network = model
        elif model.config.use_portable_cells:
            network.argmax = compat.portable_argmax  # a LoRA wrapper generates in the model's place
        path = compat.checkpoint_path(self.config)
        if path and not (self.config.use_parallel and one_program(self.config)):
            path = str(resumed_file(self.config) or path)  # a whole model in each rank's file
        if path:
            check_checkpoint(path, network)
        return network


def _prepare(config, run, built):
    """The checks of every run, and a checkpoint in the model's layout; for sections in `built` objects are given."""
    normalize_values(config)
    check_config(config, run, built)
    check_run_layout(config)
    _convert_huggingface_folder(config)


def _convert_huggingface_folder(config):
    """A Hugging Face folder in load_checkpoint becomes a checkpoint in the model's layout, whatever its kind."""
    path, model = compat.checkpoint_path(config), config.model.model_config
    concat = (model.get("qkv_concat", True), model.get("mlp_concat", True))
    folder, suffix = config.output_dir or "./output", config.get("load_ckpt_format")
    later = bool(config.auto_trans_ckpt)
    chosen = checkpoint_to_load(path, folder, suffix, *concat, later, model_config=model, log=logger.warning)
    if chosen != path:
        logger.info("%s is a Hugging Face folder; loading %s, converted from it", path, chosen)
        compat.set_checkpoint_path(config, chosen)


def _built(arguments, dataset):
    """Sections for which the caller of `train` or `evaluate` brings an object."""
    names = {
        "dataset": (dataset,),
        "eval_dataset": ("eval_dataset",),
        "wrapper": ("runner_wrapper",),
        "optimizer": ("optimizer", "lr_schedule"),
    }
    return [name for argument, sections in names.items() if arguments.get(argument) is not None for name in sections]


def _name_columns(config, sections):
    """Where any of these data sets is packed, the model's inputs are chosen from the columns by name.

    Training and the evaluations in between share one network, and upstream passes it the columns in the order of the
    training data; unpacked sequences have those columns without the last three.
    """
    if not any(config[section] and config[section].get("packing") for section in sections):
        return
    check_packing(config, sections)
    for section in sections:
        config[section].construct_args_key = list(PACKED_COLUMNS)
    if config.train_dataset and config.train_dataset.get("packing"):
        config.train_dataset.input_columns = list(PACKED_COLUMNS)  # 1.8 and 1.9 take them for the default
