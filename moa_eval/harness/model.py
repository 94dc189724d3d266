"""lm-eval's model "moa": arguments, tokenization and scores of HFLM, with shared prefixes computed once.

lm_eval --model moa --model_args pretrained=DIR --tasks arc_challenge,hellaswag,openbookqa,winogrande
python -m moa_eval --model moa ...                                         without the start-up line
accelerate launch --multi_gpu --num_processes 8 -m lm_eval --model moa ...     one process per GPU
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m lm_eval --model moa ...     on CPUs
"""

from __future__ import annotations

import atexit
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
import transformers
from lm_eval.api.registry import model_registry
from lm_eval.models import huggingface
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from moa_eval.harness.irregular import TRUNCATION, Irregular, counts, fit, warnings
from moa_eval.harness.loading import ModelError, check_checkpoint, check_finite, logger, one_line
from moa_eval.harness.prefix_tree import Request
from moa_eval.harness.scoring import PrefixTreeScorer
from moa_eval.harness.tokenization import PairTokenizer
from moa_lm import MoALlamaConfig, MoALlamaForCausalLM
from moa_lm.convert import require_shapes

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

HFLM: Any = huggingface.HFLM
"""lm-eval's class, whose type its untyped decorator hides."""
IRREGULAR_KEY = "moa: irregular items"
"""Key in lm-eval's cache of answers, whose own keys are hashes."""
NOT_SCORED = (-math.inf, False)

TokenRequest = tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]
"""(strings, context, continuation), as HFLM passes requests; no strings for rolling likelihood."""


class MoALM(HFLM):
    """Any causal language model of transformers, `moa_llama` included, for lm-eval.

    Takes the arguments of `lm_eval.models.huggingface.HFLM` and inherits generation and rolling likelihood. Scores
    equal HFLM's in float32; in half precision log-softmax runs in float32 unless `softmax_dtype` is set, where HFLM
    rounds it. A model that tree scoring would not be exact for is scored by HFLM's code, with a warning.

    Args:
        pretrained: Folder or hub name of a checkpoint with safetensors weights, or a loaded model.
        truncation: What to do with a request longer than `max_length`. "left" truncates the context; of a longer
            continuation it scores the last `max_length` tokens. "skip" scores -inf, so that the option is not chosen.
            "error" raises ModelError before anything is scored. True and False are HFLM's, for generation.
        **kwargs: HFLM's arguments. `batch_size` 1 (the default) and "auto" choose batches that fill the device; a
            larger number bounds a batch by what HFLM would hold at that size. Scores do not depend on it.

    Raises:
        ModelError: The checkpoint or an argument cannot be used.
    """

    # lm-eval documents no hooks inside HFLM. Overridden are _get_config, _create_tokenizer, _create_model and
    # _loglikelihood_tokens; _rank and _world_size are set. Seen in lm-eval 0.4.13.

    def __init__(self, pretrained: Any = None, *, truncation: str | bool | None = "left", **kwargs: Any) -> None:
        if pretrained is None:
            raise ModelError("no checkpoint given: pass --model_args pretrained=DIR")
        self._name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        self._truncation = truncation if isinstance(truncation, str) else "left"
        if self._truncation not in TRUNCATION:
            raise ModelError(f"truncation={truncation!r} is not available: choose {', '.join(TRUNCATION)}")
        for name in ("dtype", "softmax_dtype", "mixed_precision_dtype"):
            dtype = kwargs.get(name)
            if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ModelError(f"{name}={dtype!r} is not a dtype: pass auto, float32, bfloat16 or float16")
        if isinstance(pretrained, str):
            check_checkpoint(pretrained, kwargs)
        if os.environ.get("RANK", "0") != "0":
            _quiet()
        super().__init__(pretrained, truncation=truncation is True, **kwargs | {"backend": "causal"})
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1:  # HFLM sets these on several GPUs only
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
            if accelerator.device.type == "cpu":  # gloo's threads abort a process that exits with its group alive
                atexit.register(accelerator.end_training)
        check_finite(self.model, self._name)
        self._pair_tokenizer = PairTokenizer(self.tokenizer, self.prefix_token_id, self.add_bos_token)
        self._scorer = PrefixTreeScorer(
            self.model,
            device=torch.device(self.device),
            max_length=self.max_length,
            softmax_dtype=self.softmax_dtype,
            autocast_dtype=self.mixed_precision_dtype,
        )
        self._irregular: set[Irregular] = set()
        self._warned: set[str] = set()

    # ---- loading, called by HFLM's constructor -----------------------------------------------------------------

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        with one_line(f"read the config of {pretrained}"):
            super()._get_config(pretrained, **kwargs)
        config = self.config
        is_remote = kwargs.get("trust_remote_code") and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
        is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False)
        if not is_causal and not is_remote:
            raise ModelError(
                f"{pretrained} is of type {config.model_type!r}, not a causal language model: try --model hf"
            )

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **kwargs: Any) -> None:
        source = tokenizer if isinstance(tokenizer, str) and tokenizer else self._name
        with one_line(f"load a tokenizer from {source} (pass tokenizer=NAME_OR_DIR to use another)"):
            super()._create_tokenizer(pretrained, tokenizer, **kwargs)
            self.tokenizer("a")  # invalid values of tokenizer_config.json appear with the first text only

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        with one_line(f"load the weights of {pretrained}"):
            if isinstance(self.config, MoALlamaConfig):
                require_shapes(MoALlamaForCausalLM, Path(pretrained, kwargs.get("subfolder") or ""), self.config)
            if not kwargs.get("autogptq") and not kwargs.get("gptqmodel"):
                kwargs["use_safetensors"] = True
            super()._create_model(pretrained, **kwargs)

    # ---- scoring ------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-probability, is greedy) of each request's continuation, in the order of the requests.

        Equal to HFLM's wherever HFLM returns a number. Requests that HFLM fails at, or truncates, are handled and
        counted as `irregular.KINDS` says.
        """
        if self.enable_thinking:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # raises an error
        pairs = cast("list[tuple[str, str]]", [request.args for request in requests])
        with tqdm(desc="Tokenizing inputs", disable=disable_tqdm or self.rank != 0, leave=False) as bar:
            encoded = self._pair_tokenizer.encode(pairs, bar)
        fitted, found = [], set()
        for instance, (request, merged) in zip(requests, encoded, strict=True):
            task, doc_id = instance.task_name or "(no task)", instance.doc_id or 0
            item = f"doc_id {doc_id} of {task}"
            request, kinds = fit(request, merged, self.max_length, self._truncation, item)
            fitted.append(request)
            found |= {Irregular(kind, task, doc_id) for kind in kinds}
        self._add_irregular(found)
        scored = [(pair, *request) for pair, request in zip(pairs, fitted, strict=True) if request]
        answers = iter(self._loglikelihood_tokens(scored, disable_tqdm=disable_tqdm))
        return [next(answers) if request else NOT_SCORED for request in fitted]

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return scores of tokenized requests that fit; rolling likelihood calls this too."""
        if not requests:
            return []
        self._check_embedded(requests)
        scorer = self._scorer
        scorer.max_length, scorer.batch_size = self.max_length, self.batch_size
        longest = max(len(context) + len(continuation) - 1 for _, context, continuation in requests)
        if reason := scorer.unsupported_reason(longest):
            self._warn_once(f"{self._name} is scored by HFLM's code, without shared prefixes: {reason}")
            return super()._loglikelihood_tokens(list(requests), disable_tqdm=disable_tqdm, override_bs=override_bs)
        results: list[tuple[float, bool]] = [NOT_SCORED] * len(requests)
        bar = tqdm(
            total=len(requests),
            desc="Running loglikelihood requests",
            disable=disable_tqdm or self.rank != 0,
            miniters=max(16, len(requests) // 100),  # results come in batches: the first alone give a wrong rate
            leave=override_bs is None,  # rolling likelihood has many short bars
        )
        with bar:
            for index, log_probability, is_greedy in scorer.stream([Request(*request[1:]) for request in requests]):
                if math.isnan(log_probability):
                    dtype = scorer.base.dtype
                    raise ModelError(f"{self._name} gives NaN in {dtype}: try dtype=bfloat16 or dtype=float32")
                results[index] = (log_probability, is_greedy)
                if (strings := requests[index][0]) is not None:  # rolling likelihood caches its own sums
                    self.cache_hook.add_partial("loglikelihood", strings, results[index])
                bar.update()
        return results

    def _check_embedded(self, requests: Sequence[TokenRequest]) -> None:
        """Check that every token has an embedding; otherwise tokenizer and model do not belong together."""
        rows = getattr(self.model.get_input_embeddings(), "num_embeddings", math.inf)
        largest = max(max(tokens) for _, *parts in requests for tokens in parts if tokens)
        if largest >= rows:
            raise ModelError(
                f"the tokenizer of {self._name} yields token {largest}, but the model has {rows} embeddings: pass the "
                "model's own tokenizer by tokenizer=NAME_OR_DIR"
            )

    # ---- irregular items ----------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for the other processes and gather irregular items; lm-eval calls this after each type of request."""
        super().barrier()
        if self.world_size > 1 and (parts := self.gather_object(self._irregular_items())):
            self._add_irregular(set().union(*parts))
            self._report_irregular()

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's entries of the results file, the truncation policy, and irregular items by task and kind.

        With lm-eval's `--use_cache` the items are those of all evaluations that share the cache.
        """
        irregular = {"truncation": self._truncation, "irregular_items": counts(self._irregular_items())}
        return super().get_model_info() | irregular

    def _add_irregular(self, found: set[Irregular]) -> None:
        cache = self.cache_hook.dbdict
        if cache is None:
            self._irregular = found
        else:
            cache[IRREGULAR_KEY] = self._irregular_items() | found
        if self.world_size == 1:
            self._report_irregular()

    def _irregular_items(self) -> set[Irregular]:
        cache = self.cache_hook.dbdict
        return self._irregular if cache is None else cache.get(IRREGULAR_KEY, set())

    def _report_irregular(self) -> None:
        for line in warnings(self._irregular_items(), self.max_length):
            self._warn_once(line)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _quiet() -> None:
    """Show errors only: the first process shows the same warnings and progress."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


if "moa" not in model_registry:  # the start-up line, an entry point or python -m moa_eval may have registered it
    model_registry.register("moa")(MoALM)
