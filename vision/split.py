"""How the images are spread over the clients.

This is what makes federated learning hard: clients whose labels differ pull in different
directions. n images, N clients:

    iid                  every client is a small copy of the whole
    dirichlet            client i draws its class prior p_i ~ Dir(alpha); all have the same size
    dirichlet-recycled   the same, but a class that runs out is filled up again. Clients follow
                         their priors; some images are dealt more than once, and some never
    dirichlet-class      class c is cut over the clients by q_c ~ Dir(alpha); sizes differ
    dirichlet-balanced   the same, but the table [classes, N] of shares is first made doubly
                         stochastic: about equal sizes
    shards               every client sees a few classes, and no others

alpha -> infinity is iid. With alpha = 0.1, most clients of `dirichlet` hold two to four classes of
any weight. The Dirichlet splits share the name alpha, not the difficulty: never compare their
alphas.

A split is a function of (labels [n], N, rng, its settings) -> list of N arrays of image numbers. A
class without any image is left out.

Sources: dirichlet, Hsu et al. 2019. dirichlet-recycled, the code of FL-Simulator. dirichlet-class,
Li et al. 2022. dirichlet-balanced, the code of Pi et al. 2023 (DynaFed). shards, McMahan et al.
2017.
"""

import bisect
import math
from typing import Annotated

import numpy as np
import torch

Alpha = Annotated[float, "Dirichlet parameter of the split, above 0; small is skewed", 1e-12, None]


def partition(split, labels, N, seed=0, **settings):
    """Split images with these labels [n] over N clients -> N sorted tensors of image numbers.

    split: a function of this file, or its name. Raises ValueError for an impossible setting, and if
    a client would be left without images.
    """
    name = split if isinstance(split, str) else split.__name__
    split = SPLITS.get(split, split)
    labels = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    n = len(labels)
    if not 1 <= N <= n:
        raise ValueError(f"{N} clients cannot share {n} training images; clients must be in 1..{n}")
    alpha = settings.get("alpha", 1)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha = {alpha} must be a finite number above 0")
    parts = split(labels, N, np.random.default_rng(seed), **settings)
    if min(map(len, parts)) == 0:
        more = ", or a larger alpha" if "alpha" in settings else ""
        raise ValueError(
            f"partition {name!r} leaves a client without images; take fewer clients than {N}{more}"
        )
    numbers = np.concatenate(parts)
    whole = numbers.dtype.kind in "iu"
    if len(parts) != N or not whole or numbers.min() < 0 or numbers.max() >= n:
        raise ValueError(f"partition {name!r} must give N = {N} arrays of numbers in 0..{n - 1}")
    return [torch.from_numpy(np.sort(part)) for part in parts]


def by_class(labels, rng):
    """The image numbers of each class that has any, in random order: list of arrays [n_c]."""
    return [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]


def iid(labels, N, rng):
    """Cut the shuffled images into N parts."""
    by_class(labels, rng)  # unused; drawn so that a seed gives the split that it always gave
    return np.array_split(rng.permutation(len(labels)), N)


# ----------------------------------------------------------- a prior over classes for each client


def dirichlet(labels, N, rng, alpha: Alpha = 0.1):
    """Client i draws images of class c with probability p_i[c], where p_i ~ Dir(alpha).

    The clients take turns to draw one image, n // N times. A class that has run out leaves every
    prior. At alpha 0.1 this happens to most clients, so their last images come from classes that
    they did not ask for; as they take turns, it happens to all of them equally often. Turns, and
    drawing without replacement, are this project's choice.
    """
    return take_turns(by_class(labels, rng), N, alpha, rng, recycle=False)


def dirichlet_recycled(labels, N, rng, alpha: Alpha = 0.1):
    """As `dirichlet`, but a class that has run out is filled up again."""
    return take_turns(by_class(labels, rng), N, alpha, rng, recycle=True)


def take_turns(pools, N, alpha, rng, recycle):
    """The draws of `dirichlet` from pools, the images of each class -> N arrays [n // N]."""
    left = [len(pool) for pool in pools]
    prior = rng.dirichlet([alpha] * len(pools), N) + 1e-12  # so that every class is possible
    cuts = np.cumsum(prior, 1).tolist()  # lists, as bisect on them is much faster than numpy
    parts = [[] for _ in range(N)]
    last = len(pools) - 1  # the last class that can still be drawn
    for _ in range(sum(left) // N):
        for i, r in zip(rng.permutation(N).tolist(), rng.random(N).tolist()):
            # rounding may carry r times the sum up to the sum, hence min
            c = min(bisect.bisect_right(cuts[i], r * cuts[i][-1]), last)
            left[c] -= 1
            parts[i].append(pools[c][left[c]])
            if left[c] == 0 and recycle:
                left[c] = len(pools[c])
            elif left[c] == 0:
                prior[:, c] = 0
                cuts = np.cumsum(prior, 1).tolist()
                last = max((k for k, images in enumerate(left) if images), default=0)
    return [np.array(part) for part in parts]


# ------------------------------------------------------------ shares of the clients for each class


def dirichlet_class(
    labels,
    N,
    rng,
    alpha: Alpha = 0.1,
    min_size: Annotated[int, "dirichlet-class: least images of a client", 1, None] = 10,
):
    """Cut each class over the clients by q_c ~ Dir(alpha).

    Then the largest clients give images to those below min_size. Li et al. draw again until all
    have min_size, which may never happen; refilling is this project's choice.
    """
    if min_size * N > len(labels):
        raise ValueError(
            f"min_size = {min_size} images for each of {N} clients "
            f"are more than the {len(labels)} there are"
        )
    pools = by_class(labels, rng)
    parts = [part.tolist() for part in cut(pools, rng.dirichlet([alpha] * N, len(pools)))]
    while min(map(len, parts)) < min_size:
        largest, smallest = max(parts, key=len), min(parts, key=len)
        smallest.append(largest.pop(rng.integers(len(largest))))
    return [np.array(part) for part in parts]


def dirichlet_balanced(labels, N, rng, alpha: Alpha = 0.1):
    """As `dirichlet_class`, but with shares that give all clients about the same size."""
    pools = by_class(labels, rng)
    return cut(pools, doubly_stochastic(rng.dirichlet([alpha] * N, len(pools))))


def cut(pools, shares):
    """Cut pools[c] [n_c] in proportion to shares[c] [N], for every class c -> N arrays."""
    pieces = []
    for pool, share in zip(pools, shares):
        ends = (np.cumsum(share)[:-1] * len(pool)).astype(int)
        pieces.append(np.split(pool, ends))
    return [np.concatenate(mine) for mine in zip(*pieces)]


def doubly_stochastic(shares, rounds=1000):
    """Scale columns of shares [C, N] to the sum C / N and rows to the sum 1, in turn -> [C, N].

    A client whose shares are all 0 in floating point gets equal ones first. Sinkhorn and Knopp
    1967; the number of rounds is that of DynaFed's code.
    """
    C, N = shares.shape
    shares = shares + 1e-300
    for _ in range(rounds):
        shares = shares / shares.sum(0) * (C / N)
        shares = shares / shares.sum(1, keepdims=True)
    return shares


# ------------------------------------------------------------------------------ a few whole classes


def shards(
    labels,
    N,
    rng,
    classes_per_client: Annotated[int, "shards: classes of a client", 1, None] = 1,
):
    """Deal classes_per_client classes to every client; the holders of a class share it equally.

    A client whose deal repeats a class holds fewer. McMahan et al. cut the images sorted by label
    into equal shards; here they are cut at the borders of classes, which is this project's choice.
    """
    pools, c = by_class(labels, rng), classes_per_client
    C = len(pools)
    if not 1 <= c <= C or c * N < C:
        raise ValueError(
            f"classes_per_client = {c} with {N} clients cannot cover {C} classes; "
            f"it must be in {max(1, math.ceil(C / N))}..{C}"
        )
    deal = [rng.permutation(C) for _ in range(math.ceil(c * N / C))]
    deal = np.concatenate(deal)[: c * N].reshape(N, c)
    parts = [[] for _ in range(N)]
    for k, pool in enumerate(pools):
        holders = [i for i in range(N) if k in deal[i]]
        for i, piece in zip(holders, np.array_split(pool, len(holders))):
            parts[i].extend(piece)
    return [np.array(part) for part in parts]


SPLITS = {
    "iid": iid,
    "dirichlet": dirichlet,
    "dirichlet-recycled": dirichlet_recycled,
    "dirichlet-class": dirichlet_class,
    "dirichlet-balanced": dirichlet_balanced,
    "shards": shards,
}
