"""Several sizes in one comparison: who is of one size, who of one family, and what is compared with what.

A family is an FFN at every size it was trained at: a line in the figure of loss against size. A difference is taken
between contenders of one size, so that it is the FFN's and not the size's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moa_eval.training.configuration import ABSENT, canonical, config_difference, ffn_part, role, size_part

_OF_NO_METHOD = ("identity", "bookkeeping", "peak rate", "size")

Config = Mapping[str, Any]


def sizes(configs: Sequence[Config]) -> list[int]:
    """The size of each configuration, numbered in the order of appearance."""
    return _numbered([canonical(size_part(config)) for config in configs])


def families(configs: Sequence[Config]) -> list[int]:
    """The family of each configuration, numbered in the order of appearance.

    Of several with one FFN and one size, such as a baseline and its widened form, the one most like the first
    configuration is the FFN's; each of the others makes a family of its own with those that differ in the same way.
    """
    ffns = [canonical(ffn_part(config)) for config in configs]
    rivals: dict[tuple[int, str], list[int]] = {}
    for index, key in enumerate(zip(sizes(configs), ffns, strict=True)):
        rivals.setdefault(key, []).append(index)
    names = list(ffns)
    for group in rivals.values():
        plain = min(group, key=lambda index: len(_method_difference(configs[0], configs[index])))
        for index in group:
            names[index] += canonical(_method_difference(configs[plain], configs[index]))
    return _numbered(names)


def baselines(configs: Sequence[Config]) -> list[int | None]:
    """With which of the configurations each is compared; None for the first, and for those that stand beside it.

    That is the one of the first one's family that has the same size, where there is one, else the first itself. The
    first one's family at further sizes is a baseline there, and compared with nothing, as soon as any of these sizes
    has another family to compare with it; before that such a model is an alternative like all others.
    """
    size, family = sizes(configs), families(configs)
    at_size = {size[i]: i for i in reversed(range(len(configs))) if family[i] == family[0]}
    several = any(size[i] != size[0] and size[i] in at_size for i in range(len(configs)) if family[i] != family[0])

    def baseline(i: int) -> int | None:
        if family[i] == family[0]:
            return None if i == 0 or several else 0
        return at_size.get(size[i], 0)

    return [baseline(i) for i in range(len(configs))]


def size_keys(configs: Sequence[Config]) -> list[str]:
    """The keys by which the sizes of some configurations differ."""
    parts = [size_part(config) for config in configs]
    return [
        key
        for key in dict.fromkeys(key for part in parts for key in part)
        if len({canonical(part.get(key, ABSENT)) for part in parts}) > 1
    ]


def _method_difference(a: Config, b: Config) -> dict[str, Any]:
    """The keys in which two methods of one size differ, with the value of the second."""
    differing = config_difference([a, b])
    return {key: values[1] for key, values in differing.items() if role(key, values) not in _OF_NO_METHOD}


def _numbered(names: Sequence[str]) -> list[int]:
    order = [*dict.fromkeys(names)]
    return [order.index(name) for name in names]
