"""Tell what a run takes on devices that are not there: memory, hours, links, loader, checkpoints.

    python scripts/plan.py --config configs/mae/vit_b16_qdmoa_800ep.yaml --gpu h200 --gpus 8
    python scripts/plan.py --config configs/lm/moe_2b_qdmoa.yaml --gpu h100 --gpus 1,8,64,512 --parallel fsdp2
    python scripts/plan.py --help

Neither data nor weights are needed. Formulas and what they leave out: docs/planning.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from task_kind import LANGUAGE, VISION, training_script

from moa_train.config import RunConfig, parse_config
from moa_train.devices import GPUS, SavedBytes, find_gpu, trace_saved_bytes
from moa_train.errors import require
from moa_train.forecast import (
    Cluster,
    Reading,
    Workload,
    aligned,
    assumed_rate,
    count_states,
    describe_forecast,
    describe_workload,
    forecast,
    markdown,
    measured_rate,
    table,
)
from moa_train.plan import ASSUMED_UTILIZATION, TRAINING_FLOPS_PER_FORWARD
from moa_train.reading import read_yaml

IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1k."""

IMAGENET_IMAGE_BYTES = 110_000
"""Mean size of its JPEGs."""

IMAGES_PER_CORE_S = 318.0
"""Decoded, cropped and resized by one core: 110 KB JPEGs on a 2.5 GHz Xeon (scripts/benchmarks/loader.py)."""

DECODING_PART = 318 / 414
"""Of that time, what decoding takes (414 images/s alone); data.repeated_augmentation crops share it."""


def build_parser(*, files: bool = True) -> argparse.ArgumentParser:
    """Return the parser of the plan's own options, without --config unless `files`; all others are keys."""
    parser = argparse.ArgumentParser(
        prog="plan.py",
        usage="%(prog)s --config FILE [--gpus N[,N...]] [--gpu NAME] [options] [--KEY.SUBKEY VALUE ...]",
        description="Tell what a run takes on devices that are not there. Neither data nor weights are needed.",
        epilog="Several --config are layered, and any key can be set, as in training: --loop.micro_batch_size 32; "
        f"all keys: {VISION.name} --help, {LANGUAGE.name} --help. Formulas and their limits: docs/planning.md.",
        allow_abbrev=False,
    )
    if files:
        parser.add_argument(
            "--config", type=Path, action="append", required=True, metavar="FILE", help="of vision or language"
        )
    what = parser.add_argument_group("on what")
    what.add_argument(
        "--gpus", type=_counts, default=[8], metavar="N", help="how many (default: 8); 1,8,64 makes a table"
    )
    names = ", ".join(gpu.name.lower().replace(" ", "-") for gpu in GPUS)
    what.add_argument("--gpu", type=_gpu, default="h200", metavar="NAME", help=f"one of {names} (default: h200)")
    what.add_argument("--gpus-per-node", type=_positive(int), default=8, metavar="N", help="default: %(default)s")
    what.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp", help="default: %(default)s")
    what.add_argument(
        "--network",
        type=_positive(float),
        default=400.0,
        metavar="GB/S",
        help="of a node to the others, one direction (default: %(default)g, eight ports of 400 Gb/s)",
    )
    what.add_argument(
        "--disk", type=_positive(float), default=1.0, metavar="GB/S", help="for checkpoints (default: %(default)g)"
    )
    speed = parser.add_argument_group("how fast").add_mutually_exclusive_group()
    speed.add_argument(
        "--utilization", type=float, metavar="PART", help=f"of the bf16 peak (default: {ASSUMED_UTILIZATION})"
    )
    speed.add_argument("--measured", type=Path, metavar="RUN", help="as fast as this run was, by its run folder")
    data = parser.add_argument_group("data, where the configuration's are not here")
    data.add_argument(
        "--images", type=_positive(int), metavar="N", help=f"training images (default: {IMAGENET_IMAGES:,})"
    )
    data.add_argument(
        "--image-bytes", type=_positive(float), metavar="N", help=f"mean size (default: {IMAGENET_IMAGE_BYTES:,})"
    )
    data.add_argument("--tokens", type=_positive(int), metavar="N", help="training tokens, for schedule.epochs")
    data.add_argument(
        "--decode-rate",
        type=_positive(float),
        default=IMAGES_PER_CORE_S,
        metavar="N",
        help="images/s that one core makes ready (default: %(default)g)",
    )
    form = parser.add_argument_group("output").add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, for programs")
    form.add_argument("--markdown", action="store_true", help="the table of several --gpus, as in docs/planning.md")
    return parser


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
        return value

    return parse


def _counts(text: str) -> list[int]:
    return [int(_positive(int)(part)) for part in text.split(",")]


def _gpu(text: str) -> Any:
    try:
        return find_gpu(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_config(files: Sequence[Path], words: Sequence[str]) -> tuple[RunConfig, bool]:
    """Return the configuration that a training script makes of `words`, and whether it is a masked autoencoder's.

    Args:
        files: The configuration files among the words.
        words: --config FILE and --KEY.SUBKEY VALUE in the order given: later ones win.

    Raises:
        ValueError: a file cannot be read, or none describes a model.
        SystemExit: code 2, after a message in the training script's name, for a key or value that is wrong.
    """
    script = training_script(files)
    if script == VISION:  # each half is imported where it is wanted
        from moa_vision.pretrain import MAEConfig as Config
    else:
        from moa_lm.pretrain import LMConfig as Config
    return parse_config(Config, words, program=script.name, summary=""), script == VISION


def vision_workload(
    config: Any, *, images: int | None, image_bytes: float | None, decode_rate: float = IMAGES_PER_CORE_S
) -> Workload:
    """Return what a masked autoencoder's run asks for; None takes the data's own, or ImageNet-1k's without data.

    Raises ValueError for a model that cannot be.
    """
    from moa_ffn import FFN
    from moa_vision.index import open_index
    from moa_vision.mae import forward_flops, parameter_counts
    from moa_vision.pretrain import build_mae

    assumed = []
    index = None
    try:
        if (images is None or image_bytes is None) and images_are_here(config.data.train):
            index = open_index(config.data.train, config.data.cache_dir, image_key=config.data.image_key)
    except (OSError, RuntimeError) as error:  # DataError among them
        raise ValueError(f"data.train is {config.data.train!r}, which cannot be read: {error}") from error
    if index is not None:
        images, image_bytes = images or len(index), image_bytes or float(index.table.sizes.mean())
    if images is None or image_bytes is None:
        images, image_bytes = images or IMAGENET_IMAGES, image_bytes or IMAGENET_IMAGE_BYTES
        assumed.append(f"{images:,} images of {image_bytes:,.0f} bytes (--images, --image-bytes)")
    assumed.append(f"{decode_rate:g} images/s a core (--decode-rate)")
    with torch.device("meta"):
        mae = build_mae(config.model)
    for module in mae.modules():
        if isinstance(module, FFN):
            module.backend = "eager"  # what the tracing of saved tensors can follow
    size = [rows * mae.patch_size for rows in mae.grid_size]

    def loss(samples: int) -> torch.Tensor:
        return mae(torch.zeros(samples, mae.in_chans, *size), torch.zeros(samples, mae.num_patches)).loss

    repeats = config.data.repeated_augmentation
    return Workload(
        title=f"{config.model.encoder} at {' x '.join(map(str, size))}",
        parameters=parameter_counts(mae),
        unit="img",
        units_per_sample=1,
        samples_per_epoch=images // repeats * repeats,
        budget=config.schedule.budget,
        flops_per_sample=TRAINING_FLOPS_PER_FORWARD * forward_flops(mae),
        states=count_states(mae),
        saved=trace_saved_bytes(mae, loss, bf16=config.loop.precision == "bf16"),
        reading=Reading(
            stored_bytes=image_bytes,
            core_s=(1 - DECODING_PART) / decode_rate,
            workers=config.data.workers,
            decode_s=DECODING_PART / decode_rate,
            repeats=repeats,
        ),
        assumed=tuple(assumed),
    )


def images_are_here(pattern: str) -> bool:
    """Whether `pattern` names local shards, as data.train does; nothing is fetched or run to find out.

    Raises OSError or RuntimeError for a path that cannot be looked at.
    """
    from moa_vision.cache import is_remote
    from moa_vision.index import expand

    if any(is_remote(part) and not part.startswith("file:") for part in pattern.split("::")):
        return False
    try:
        return bool(expand(pattern))
    except ValueError:
        return Path(pattern).expanduser().exists()  # without shards: open_index says so


def language_workload(config: Any, *, tokens: int | None) -> Workload:
    """Return what a language model's run asks for; without its shards GPT-2's vocabulary is taken.

    Raises ValueError for a model that cannot be, and for a budget in epochs of nobody knows how many tokens.
    """
    from moa_lm.data import TokenShards
    from moa_lm.flops import forward_flops
    from moa_lm.modeling import MoALlamaForCausalLM
    from moa_lm.pretrain import budgeted, model_config
    from moa_lm.sizes import VOCAB_SIZE, count_parameters

    length, batch, assumed = config.data.sequence_length, config.schedule.batch_size, []
    try:
        manifest = Path(config.data.train).expanduser() / "manifest.json"
        shards = TokenShards(config.data.train) if manifest.exists() else None
    except (OSError, RuntimeError) as error:
        raise ValueError(f"data.train is {config.data.train!r}, which cannot be read: {error}") from error
    if shards is not None:
        model = model_config(config.model, shards, length)
        tokens = tokens or shards.tokens
    else:
        model = unread_config(config.model, length)
        assumed.append(f"a vocabulary of {VOCAB_SIZE:,} as GPT-2's (once data.train is here, its own), tokens enough")
    if tokens is None:
        require("schedule.epochs", config.schedule.epochs, config.schedule.epochs is None, "null, or give --tokens N")
        tokens = int(1 + length * batch)  # one step an epoch: the budget is in tokens, its epochs are not asked for
    parameters = budgeted(model, config.model.size)
    with torch.device("meta"):
        whole = MoALlamaForCausalLM(model)
    by_muon = stepped_by_muon(config, whole)
    return Workload(
        title=f"{config.model.size} with {config.model.ffn}; sequences of {length:,} tokens",
        parameters=count_parameters(model)._asdict(),
        unit="tok",
        units_per_sample=length,
        samples_per_epoch=(tokens - 1) // length,
        budget=lambda steps: config.schedule.budget(steps, batch * length, parameters),
        flops_per_sample=TRAINING_FLOPS_PER_FORWARD * forward_flops(model, length),
        states=count_states(whole, [*by_muon]),
        saved=language_saved_bytes(
            model,
            length,
            bf16=config.loop.precision == "bf16",
            checkpointed=config.model.gradient_checkpointing,
            masked=config.data.document_mask,
        ),
        reading=Reading(
            stored_bytes=(length + 1) * (2 if model.vocab_size <= 2**16 else 4),
            core_s=0.0,
            workers=config.data.workers,
        ),
        muon=tuple(by_muon.values()),
        assumed=tuple(assumed),
    )


def unread_config(model: Any, length: int) -> Any:
    """Return the MoALlamaConfig of a `moa_lm.pretrain.ModelConfig` on tokens that are not here, checked as training
    does; their vocabulary is taken to be GPT-2's. Raises ValueError.
    """
    from moa_lm.pretrain import checked_config
    from moa_lm.sizes import END_OF_TEXT, VOCAB_SIZE

    given = {"vocab_size": VOCAB_SIZE, "bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    return checked_config(model, given | {"max_position_embeddings": max(2048, length)})


def stepped_by_muon(config: Any, model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a language model that Muon steps in a run of `config`, name to shape."""
    from moa_lm.groups import hidden_matrices

    names = hidden_matrices(model) if config.optim.algorithm == "muon" else set()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in names}


def recorded_muon(run: Path) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of what Muon stepped in a recorded run, from its configuration; none without Muon.

    Raises:
        ValueError: `run` has no configuration that can be read.
        SystemExit: code 2, after a message, for one with Muon that is none of this version's.
    """
    file = run / "config.yaml"
    try:
        optim = read_yaml(file, "--measured takes the folder of a run").get("optim")
    except ValueError as error:
        raise ValueError(f"measured is {str(run)!r}; it must be a run folder ({error})") from error
    if not isinstance(optim, dict) or optim.get("algorithm") != "muon":
        return ()  # whatever trained there
    from moa_lm.modeling import MoALlamaForCausalLM

    config: Any = read_config([file], [f"--config={file}"])[0]
    with torch.device("meta"):
        model = MoALlamaForCausalLM(unread_config(config.model, config.data.sequence_length))
    return tuple(stepped_by_muon(config, model).values())


def language_saved_bytes(
    model: Any, length: int, *, bf16: bool, checkpointed: bool = False, masked: bool = False
) -> SavedBytes:
    """Return what backward needs of sequences of `length` tokens; `model` is a MoALlamaConfig.

    Layers are alike, so that models of one and of two tell of all. With gradient checkpointing each layer's input
    stays, in float32, and all of one layer. `masked` is data.document_mask, whose mask each layer keeps.
    """
    from moa_lm.modeling import MoALlamaForCausalLM

    fields = {"ffn_backend": "eager", "expert_dispatch": "grouped"}  # what tracing can follow

    def traced(layers: int) -> SavedBytes:
        shape = {"num_hidden_layers": layers, "layer_types": None}
        own = {key: value for key, value in model.to_dict().items() if key not in {**fields, **shape}}
        with torch.device("meta"):
            shallow = MoALlamaForCausalLM(type(model)(**own, **fields, **shape))

        def loss(samples: int) -> torch.Tensor:
            tokens = torch.zeros(samples, length, dtype=torch.int64)
            places = {"position_ids": torch.arange(length).repeat(samples, 1)} if masked else {}
            found = shallow(input_ids=tokens, shift_labels=tokens, skip_logits=True, **places).loss
            assert found is not None
            return found

        return trace_saved_bytes(shallow, loss, bf16=bf16)

    one, two, layers = traced(1), traced(2), model.num_hidden_layers
    layer = SavedBytes(*(b - a for a, b in zip(one, two, strict=True)))
    if checkpointed:
        inputs = layers * 4 * length * model.hidden_size
        return SavedBytes(one.fixed, one.per_sample + inputs)
    return SavedBytes(*(a + (layers - 1) * more for a, more in zip(one, layer, strict=True)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan that the command line asks for; return 0, or 2 after a message for what cannot be planned."""
    parser = build_parser()
    options, _ = parser.parse_known_args(arguments)
    _, words = build_parser(files=False).parse_known_args(arguments)
    if options.markdown and len(options.gpus) == 1:
        parser.error("--markdown prints the table of several --gpus, e.g. --gpus 1,8,64")
    try:
        config, is_autoencoder = read_config(options.config, words)
        gpu = options.gpu if not isinstance(options.gpu, str) else find_gpu(options.gpu)
        if options.measured:
            rate, source = measured_rate(options.measured, gpu, recorded_muon(options.measured), options.parallel)
        else:
            rate, source = assumed_rate(gpu, options.utilization)
        if is_autoencoder:
            workload = vision_workload(
                config, images=options.images, image_bytes=options.image_bytes, decode_rate=options.decode_rate
            )
        else:
            workload = language_workload(config, tokens=options.tokens)
        if config.start_from:
            begun = f"from step 0, whatever start_from {config.start_from} has behind it"
            workload = replace(workload, assumed=(*workload.assumed, begun))
        cluster = Cluster(
            gpu=gpu,
            flops=rate,
            flops_source=source,
            gpus_per_node=options.gpus_per_node,
            network_gb_s=options.network,
            disk_gb_s=options.disk,
            parallel=options.parallel,
        )
        found = [forecast(config, workload, cluster, gpus) for gpus in options.gpus]
    except ValueError as error:
        _refuse(parser, str(error))
    if options.json:
        trees = [plan.as_tree() for plan in found]
        print(json.dumps({"workload": workload.as_tree(), "plans": trees}, indent=2))
    elif options.markdown:
        print(markdown(table(found)))
    else:
        lines = describe_workload(workload)
        if len(found) == 1:
            lines |= describe_forecast(found[0], workload, cluster)
        else:
            lines |= {"devices": f"{gpu.name}, {options.parallel}", "time": f"at {source}"}
        for title, text in lines.items():
            print(f"{title:<11} {text}")
        if len(found) > 1:
            print(f"\n{aligned(table(found))}")
            for plan in found:
                for note in plan.notes:
                    print(f"{plan.gpus} GPUs: {note}")
    return 0


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    parser.exit(2, f"{parser.prog}: error: {message}\n")
    raise AssertionError("parser.exit returned")


if __name__ == "__main__":
    sys.exit(main())
