"""MoALM: lm-eval's model "moa". HFLM's arguments, numbers and tokenization; shared prefixes computed once.

    lm_eval --model moa --model_args pretrained=DIR --tasks arc_challenge,hellaswag,openbookqa,winogrande
    python -m moa_eval --model moa ...                                   the same without a start-up hook
    accelerate launch --multi_gpu --num_processes 8 -m lm_eval --model moa ...    one process a GPU
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m lm_eval --model moa ...    on CPUs

Every process scores its share of the items, on CPUs too; the first one gathers them and writes one result file.
(`accelerate launch --cpu --num_processes 2` starts one process only.)
"""

import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
import transformers
from lm_eval.api.registry import model_registry
from lm_eval.models import huggingface
from lm_eval.models.utils import has_bos_prefix
from lm_eval.models.utils_hf import get_dtype
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from moa_eval.harness.irregular import TRUNCATION, Irregular, counts, fit, warnings
from moa_eval.harness.loading import ModelError, check_finite, check_folder, one_line, unknown_argument, unreadable
from moa_eval.harness.prefix_tree import Request
from moa_eval.harness.scoring import PrefixTreeScorer
from moa_lm import MoALlamaConfig, MoALlamaForCausalLM  # registers moa_llama with transformers
from moa_lm.convert import require_shapes

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger("lm_eval.models.moa")  # lm-eval's format, and its LMEVAL_LOG_LEVEL

HFLM: Any = huggingface.HFLM  # lm-eval's untyped decorator hides from type checkers what it is

TOKENIZER_CALL = 2048  # strings a call of the tokenizer: enough for its threads, little memory
BUILT_IN_TYPES = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
IRREGULAR_KEY = "moa: irregular items"  # beside the answers in lm-eval's cache, whose keys are hashes
NOT_SCORED = (-math.inf, False)

TokenRequest = tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]


class MoALM(HFLM):
    """lm-eval model "moa": any causal language model that transformers loads, `moa_llama` included.

    Takes the arguments of `lm_eval.models.huggingface.HFLM` and inherits generation and rolling likelihood.
    Continuations are scored with every shared prefix computed once (`scoring.py`), to HFLM's values in float32.
    In half precision log-softmax still runs in float32 unless `softmax_dtype` says otherwise; HFLM rounds it. A model
    that this would not be exact for is scored by HFLM's own code, and a warning says why.

    `batch_size` 1, HFLM's default, and "auto" choose batches that fill the device and stay small; a larger number
    allows what HFLM would put into a batch of that many requests. Scores do not depend on it.

    `truncation` says what becomes of a request longer than `max_length`. "left": cut from the left, as by HFLM; of a
    continuation that is longer itself, where HFLM fails, the last `max_length` tokens are scored. "skip": not scored,
    log-likelihood -inf, so that such an option is not chosen. "error": a ModelError before anything is scored. True
    and False are HFLM's, for generation. Items with such requests are counted in the results (`get_model_info`).

    Raises ModelError for a checkpoint or an argument that cannot be used.
    """

    # lm-eval has no documented hooks between HFLM's constructor and its requests. Its methods overridden here
    # (`_get_config`, `_get_backend`, `_create_tokenizer`, `_create_model`, `_loglikelihood_tokens`, and the fields
    # `_rank`, `_world_size`) are where errors become one line and where scoring differs; seen in lm-eval 0.4.13.

    def __init__(
        self, pretrained: Any = None, *args: Any, truncation: str | bool | None = "left", **kwargs: Any
    ) -> None:
        if pretrained is None:
            raise ModelError("no checkpoint given: pass --model_args pretrained=DIR")
        if isinstance(pretrained, str):
            check_folder(pretrained, kwargs)
        with one_line(f"use dtype={kwargs.get('dtype')!r}"):
            get_dtype(kwargs.get("dtype", "auto"))
        self._truncation = truncation if isinstance(truncation, str) else "left"
        if self._truncation not in TRUNCATION:
            raise ModelError(f"truncation={truncation!r} is not available: choose {', '.join(TRUNCATION)}")
        if os.environ.get("RANK", "0") != "0":  # the first process gives the same notices
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            datasets.disable_progress_bars()
        super().__init__(pretrained, *args, truncation=truncation is True, **kwargs)
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1:  # HFLM does this on several GPUs only
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        check_finite(self.model, self._name(pretrained))
        self._scorer = PrefixTreeScorer(
            self.model,
            device=torch.device(self.device),
            max_length=self.max_length,
            softmax_dtype=self.softmax_dtype,
            autocast_dtype=self.mixed_precision_dtype,
        )
        self._warned: set[str] = set()
        self._found: set[Irregular] = set()
        self._found_by_all: set[Irregular] = set()

    # ---- loading ------------------------------------------------------------------------------------------------

    @staticmethod
    def _name(pretrained: Any) -> str:
        return pretrained if isinstance(pretrained, str) else type(pretrained).__name__

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        with one_line(f"read the config of {pretrained}"):
            super()._get_config(pretrained, **kwargs)

    def _get_backend(self, config: Any, backend: Any = "default", trust_remote_code: bool | None = False) -> None:
        kind = getattr(config, "model_type", type(config).__name__)
        remote = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
        known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        if backend == "default" and known and kind not in BUILT_IN_TYPES:
            backend = "causal"  # registered from outside, as moa_llama is: HFLM would warn and guess
        super()._get_backend(config, backend=backend, trust_remote_code=trust_remote_code)
        if self.backend != "causal" or not (
            known or remote or isinstance(getattr(self, "_model", None), torch.nn.Module)
        ):
            raise ModelError(
                f"the checkpoint is of type {kind!r}, no causal language model: this model evaluates those only "
                "(--model hf takes encoder-decoders)"
            )

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **kwargs: Any) -> None:
        source = tokenizer if isinstance(tokenizer, str) and tokenizer else self._name(pretrained)
        try:
            super()._create_tokenizer(pretrained, tokenizer, **kwargs)
            self.tokenizer("a")  # odd values of tokenizer_config.json are found with the first text only
        except Exception as error:  # the library `tokenizers` raises nothing more special
            if any(Path(source).glob("tokenizer*")):
                with one_line(f"load the tokenizer of {source}"):
                    raise
            raise ModelError(
                f"no tokenizer could be loaded from {source}: save one there (tokenizer.save_pretrained) or name one "
                "with tokenizer=NAME_OR_DIR"
            ) from error

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        try:
            with one_line(f"load the weights of {pretrained}"):
                if isinstance(self.config, MoALlamaConfig):
                    folder = Path(pretrained, kwargs.get("subfolder") or "")
                    require_shapes(MoALlamaForCausalLM, folder, self.config)
                if not (kwargs.get("autogptq") or kwargs.get("gptqmodel")):  # they are told by HFLM, or know no other
                    kwargs["use_safetensors"] = True
                super()._create_model(pretrained, **kwargs)
        except ModelError as error:
            cause = error.__cause__
            if isinstance(cause, SafetensorError):
                raise ModelError(unreadable(Path(pretrained, kwargs.get("subfolder") or ""), cause)) from cause
            if "ignore_mismatched_sizes" in str(cause):
                raise ModelError(f"the weights in {pretrained} do not have the shapes of its config.json") from cause
            if isinstance(cause, TypeError) and "unexpected keyword argument" in str(cause):
                raise ModelError(unknown_argument(str(cause).split("'")[1], HFLM.__init__)) from cause
            raise

    # ---- scoring ------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, greedy decoding gives it) of each request's continuation, in the order of the requests.

        As HFLM's where it gives a number, with every distinct string tokenized once, in batches. Requests that HFLM
        fails at are scored from the nearest token boundary on, cut, or left out as `irregular.KINDS` says.
        """
        if self.enable_thinking:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # refuses, with its own words
        pairs = cast("list[tuple[str, str]]", [request.args for request in requests])
        fitted: list[Request | None] = []
        found: set[Irregular] = set()
        for request, (encoded, merged) in zip(requests, self._encode_pairs(pairs, disable_tqdm), strict=True):
            fits, kinds = fit(encoded, merged, self.max_length, self._truncation)
            fitted.append(fits)
            task, document = request.task_name or "(no task)", request.doc_id or 0
            if self._truncation == "error" and fits and fits != encoded:
                raise ModelError(
                    f"doc_id {document} of {task} has {len(encoded.context)} tokens of context and "
                    f"{len(encoded.continuation)} of continuation, more than max_length={self.max_length}: raise it "
                    "if the model allows it, lower num_fewshot, or pass truncation=left or truncation=skip"
                )
            found.update(Irregular(kind, task, document) for kind in kinds)
        self._remember(found)
        scored = [(pair, fits.context, fits.continuation) for pair, fits in zip(pairs, fitted, strict=True) if fits]
        answers = iter(self._loglikelihood_tokens(scored, disable_tqdm=disable_tqdm))
        return [next(answers) if fits else NOT_SCORED for fits in fitted]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]], disable_tqdm: bool) -> list[tuple[Request, bool]]:
        """Token ids of (context, continuation) strings, and whether the two merge: TemplateLM.loglikelihood, batched.

        Spaces that end a context go to the continuation, which is what the joint text has beyond the context's number
        of tokens. Where it has none there, its first characters are in one token with the last ones of the context:
        that token and what follows is scored.
        """
        split = []
        for context, continuation in pairs:
            kept = context.rstrip()
            split.append((kept, context[len(kept) :] + continuation) if context else (None, continuation))
        joined = [part for kept, rest in split if kept is not None for part in (kept, kept + rest)]
        bar = tqdm(desc="Tokenizing inputs", disable=disable_tqdm or self.rank != 0, leave=False)
        ids = self._encode_strings(joined, None, bar)
        alone = self._encode_strings([rest for kept, rest in split if kept is None], False, bar)
        bar.close()
        encoded = []
        for kept, rest in split:
            context, whole = ([], alone[rest]) if kept is None else (ids[kept], ids[kept + rest])
            merged = whole != context and len(whole) <= len(context)
            if merged:
                context = whole[: self._first_token_of(rest, whole)]
            continuation = whole[len(context) :]
            if not context:
                context, continuation = self._behind_prefix_token(whole)
            encoded.append((Request(context, continuation), merged))
        return encoded

    def _first_token_of(self, ending: str, tokens: list[int]) -> int:
        """Index of the token in which the text's ending begins."""
        begin = len(tokens) - 1
        while begin > 0 and len(self.tokenizer.decode(tokens[begin:])) < len(ending):
            begin -= 1
        return max(begin, 0)

    def _behind_prefix_token(self, tokens: list[int]) -> tuple[list[int], list[int]]:
        """A text without a context behind the prefix token, which may be its own first token."""
        prefix = self.prefix_token_id
        if prefix is None:
            raise ModelError(
                f"the tokenizer of {self._name(self.pretrained)} has neither bos_token nor eos_token to score a text "
                "without a context behind: name one with custom_prefix_token_id=ID"
            )
        return [prefix], tokens[1:] if tokens[:1] == [prefix] else tokens

    def _encode_strings(
        self, strings: Iterable[str], add_special_tokens: bool | None, bar: tqdm
    ) -> dict[str, list[int]]:
        """Token ids of each distinct string, as `tok_encode` gives them one by one."""
        prefix = None if self.prefix_token_id is None else self.tokenizer.decode(self.prefix_token_id)
        plain, begun = [], []  # begun: the text already starts with the prefix token, none is added
        for string in dict.fromkeys(strings):
            (begun if add_special_tokens is None and has_bos_prefix(string, prefix) else plain).append(string)
        encoded: dict[str, list[int]] = {}
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        for group, flag in ((plain, special), (begun, False)):
            arguments: dict[str, Any] = {} if flag is None else {"add_special_tokens": flag}
            for start in range(0, len(group), TOKENIZER_CALL):
                part = group[start : start + TOKENIZER_CALL]
                # not verbose: what is too long is cut and counted later
                ids = self.tokenizer(part, return_attention_mask=False, verbose=False, **arguments)["input_ids"]
                encoded.update(zip(part, ids, strict=True))
                bar.update(len(part))
        return encoded

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Scores of tokenized requests that fit, by HFLM's code where trees are not exact for the model or length."""
        self._require_embedded(requests)
        scorer = self._scorer
        scorer.max_length, scorer.batch_size = self.max_length, self.batch_size
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in requests]
        reason = scorer.refusal(max(lengths)) if requests else None
        if reason:
            self._warn_once(f"{self._name(self.pretrained)} is scored by HFLM's code, one pass a request: {reason}")
            return super()._loglikelihood_tokens(list(requests), disable_tqdm=disable_tqdm, override_bs=override_bs)
        results: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        disabled, leave = disable_tqdm or self.rank != 0, override_bs is None  # rolling likelihood: many short bars
        # Results come in batches: a rate from the first few results alone would be far too low.
        every, title = max(16, len(requests) // 100), "Running loglikelihood requests"
        with tqdm(total=len(requests), disable=disabled, desc=title, miniters=every, leave=leave) as bar:
            for index, log_probability, greedy in scorer.stream([Request(*request[1:]) for request in requests]):
                if math.isnan(log_probability):
                    raise ModelError(
                        f"{self._name(self.pretrained)} gives NaN as a log-probability in {scorer.base.dtype}: "
                        "try dtype=bfloat16 or dtype=float32"
                    )
                results[index] = answer = (log_probability, greedy)
                if (strings := requests[index][0]) is not None:  # rolling likelihood caches its own sums
                    self.cache_hook.add_partial("loglikelihood", strings, answer)
                bar.update(1)
        return results

    def _require_embedded(self, requests: Sequence[TokenRequest]) -> None:
        """Refuse tokens that the model has no embeddings of: a tokenizer of another model, or a damaged one."""
        embeddings = self.model.get_input_embeddings()
        rows = getattr(embeddings, "num_embeddings", math.inf)
        largest = max((max(tokens) for _, *parts in requests for tokens in parts if tokens), default=0)
        if largest >= rows:
            raise ModelError(
                f"the tokenizer of {self._name(self.pretrained)} gives token {largest}, but the model has {rows} "
                "embeddings: they do not belong together, name the right one with tokenizer=NAME_OR_DIR"
            )

    # ---- irregular items ----------------------------------------------------------------------------------------

    def _remember(self, found: set[Irregular]) -> None:
        """Keep and report this evaluation's irregular items, in lm-eval's cache of answers if there is one."""
        if self.cache_hook.dbdict is not None:
            found |= self._irregular_items()
            self.cache_hook.dbdict[IRREGULAR_KEY] = found
        self._found = found
        if self.world_size == 1:
            self._report()

    def _irregular_items(self) -> set[Irregular]:
        cache = self.cache_hook.dbdict
        return self._found if cache is None else cache.get(IRREGULAR_KEY, set())

    def barrier(self) -> None:
        """Wait for the other processes, and gather irregular items: all call this after each type of request."""
        super().barrier()
        if self.world_size > 1 and (parts := self.gather_object(self._irregular_items())):
            self._found_by_all = set().union(*parts)
            self._report()

    def _report(self) -> None:
        for line in warnings(self._irregular_items() | self._found_by_all, self.max_length):
            self._warn_once(line)

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, the truncation policy, and how many items of each task are irregular (`irregular.KINDS`).

        With lm-eval's `--use_cache` they are those of all evaluations that share the cache.
        """
        irregular = counts(self._irregular_items() | self._found_by_all)
        return super().get_model_info() | {"truncation": self._truncation, "irregular_items": irregular}

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


if "moa" not in model_registry:  # the start-up hook, an entry point or python -m moa_eval may have named this class
    model_registry.register("moa")(MoALM)
