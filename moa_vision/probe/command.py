"""The command `scripts/probe.py`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from moa_train.config import parse_config
from moa_train.errors import ConfigError, ReportedError, report
from moa_vision.probe.config import PLAIN_ARGUMENTS, ProbeConfig
from moa_vision.probe.encoders import TrainedEncoder, find_encoders
from moa_vision.probe.methods import KNNProbe, Probe, TrainedProbe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all methods on all encoders in order; return the first exit code that is not 0.

    Exit codes: 0 finished; 1 non-finite loss or failed data; 2 invalid configuration or data; 75 stopped and saved, the
    same command resumes.
    """
    config = parse_config(
        ProbeConfig,
        sys.argv[1:] if arguments is None else arguments,
        program="probe.py",
        summary="Evaluate trained encoders. The same command resumes what was stopped.",
        plain=PLAIN_ARGUMENTS,
        check=check,
    )
    try:
        check_processes(config)
        for encoder in selected_encoders(config):
            for probe in build_probes(config, encoder):
                code = probe.run()
                if code:
                    return code
    except ReportedError as error:
        return report(error)
    return 0


def check(config: ProbeConfig) -> None:
    """Check encoders, data and settings without running a probe; raise ConfigError or DataError."""
    for encoder in selected_encoders(config):
        build_probes(config, encoder)


def check_processes(config: ProbeConfig) -> None:
    """Raise ConfigError if a launcher started several processes for anything but one trained method."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and (len(config.method) > 1 or "knn" in config.method):
        raise ConfigError(
            f"method is {' '.join(config.method)} with {processes} processes; a launcher can run one of linear and "
            "finetune at a time, and knn runs on one device without a launcher"
        )


def selected_encoders(config: ProbeConfig) -> list[TrainedEncoder]:
    """Return the encoders of all given folders, each once; name runs of sweeps that have none."""
    selected = {}
    for path in config.runs:
        encoders, unfinished = find_encoders(path)
        selected |= {encoder.folder.resolve(): encoder for encoder in encoders}
        if unfinished:
            print(f"skipped unfinished runs: {', '.join(map(str, unfinished))}", file=sys.stderr)
    return list(selected.values())


def build_probes(config: ProbeConfig, encoder: TrainedEncoder) -> list[Probe]:
    """Build the probes of one encoder, so that all of them are checked before the first one runs."""
    return [
        KNNProbe(config, encoder) if method == "knn" else TrainedProbe(method, config, encoder)
        for method in dict.fromkeys(config.method)
    ]
