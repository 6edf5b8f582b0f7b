"""Clusters that must get equal bits: a row of the table for all of them.

Hardware and fused kernels want one width for what they read together: query,
key and value of an attention layer, or the input and recurrent weights of a
gated layer. Parameters that one module owns (`in_proj_weight`, all weights of
a torch.nn.LSTM) are one cluster and share their bits anyway.
"""

from fnmatch import fnmatchcase

import numpy as np

from ..quantization.row_groups import split_name
from ..quantization.tensors import near_misses

# Names of sibling modules that belong together, by the name of the rule.
SIBLINGS = {
    "qkv": (
        {"q", "k", "v"},
        {"query", "key", "value"},
        {"q_proj", "k_proj", "v_proj"},
        {"q_lin", "k_lin", "v_lin"},
        {"linear_q", "linear_k", "linear_v"},
        {"query_proj", "key_proj", "value_proj"},
        {"to_q", "to_k", "to_v"},
        {"wq", "wk", "wv"},
    ),
    "gates": (
        {"w", "u"},  # SpeechBrain's LiGRU and SLi-GRU
        {"ih", "hh"},
        {"i2h", "h2h"},
        {"x2h", "h2h"},
    ),
}


def equal_groups(clusters, rules):
    """Groups of clusters that must get equal bits.

    Arguments
    ---------
    clusters : iterable of str
        Names of all clusters.
    rules : sequence of str
        "qkv" and "gates": sibling modules of these kinds, layer by layer, and
        all slices of a tensor with them. Anything else is an fnmatch pattern:
        all clusters that match it are one group. Each must find something;
        groups that overlap become one.

    Returns
    -------
    groups : list of list of str
        In the clusters' order; every cluster is in one.

    Example
    -------
    >>> clusters = ["0.q", "0.k", "0.v", "0.out", "1.q", "1.k", "1.v"]
    >>> equal_groups(clusters, ["qkv"])
    [['0.q', '0.k', '0.v'], ['0.out'], ['1.q', '1.k', '1.v']]
    >>> equal_groups(clusters, ["1.*", "0.*"])
    [['0.q', '0.k', '0.v', '0.out'], ['1.q', '1.k', '1.v']]
    >>> equal_groups(clusters, [])[:2]
    [['0.q'], ['0.k']]
    """
    names = list(clusters)
    group_of = {name: {name} for name in names}
    for rule in [rules] if isinstance(rules, str) else rules:
        for together in _matches(names, rule):
            merged = set().union(*(group_of[name] for name in together))
            group_of.update(dict.fromkeys(merged, merged))
    groups = {id(group): group for group in map(group_of.get, names)}
    return [[n for n in names if n in group] for group in groups.values()]


def merged_rows(rows, names, groups):
    """Sums of the rows of every group.

    Arguments
    ---------
    rows : numpy.ndarray
        [clusters, candidates].
    names : list of str
        Clusters of the rows.
    groups : list of list of str
        As made by ``equal_groups``.

    Returns
    -------
    merged : numpy.ndarray
        [groups, candidates].

    Example
    -------
    >>> merged_rows(np.array([[1, 2], [3, 4], [5, 6]]), "abc", ["ac", "b"])
    array([[6, 8],
           [3, 4]])
    """
    index = {name: number for number, name in enumerate(names)}
    return np.array([rows[[index[n] for n in g]].sum(0) for g in groups])


def _matches(names, rule):
    """Sets of clusters that a rule puts together; it must find some."""
    if rule not in SIBLINGS:
        found = [name for name in names if fnmatchcase(name, rule)]
        if not found:
            raise ValueError(
                f"equal_bits: {rule!r} matches no cluster and is none of "
                f"{list(SIBLINGS)}{near_misses(rule, names)}"
            )
        return [found]
    families = {}
    for name in names:
        parent, _, last = split_name(name)[0].rpartition(".")
        for kind, siblings in enumerate(SIBLINGS[rule]):
            if last in siblings:
                family = families.setdefault((parent, kind), {})
                family.setdefault(last, []).append(name)
    found = [
        [name for members in family.values() for name in members]
        for (_, kind), family in families.items()
        if set(family) == SIBLINGS[rule][kind]
    ]
    if not found:
        raise ValueError(
            f"equal_bits: no modules stand beside each other as {rule!r} "
            f"expects ({', '.join(map(str, map(sorted, SIBLINGS[rule])))}): "
            "what one module owns has equal bits already; for others give a "
            "pattern on the names of clusters"
        )
    return found
