"""How images are spread over the clients: a list with one tensor of image numbers per client.

How the labels are spread is what makes federated learning hard. n images, N clients:

    iid                 every client is a small copy of the whole
    dirichlet           client i draws its own class prior p_i ~ Dir(alpha); all have the same size            (our default)
    dirichlet-recycled  the same as FL-Simulator's code does it: a class that runs out is filled up again, so that clients follow
                        their priors exactly, some images are held by several clients, and some by none
    dirichlet-class     class c is cut over the clients by q_c ~ Dir(alpha); sizes differ, none falls below a minimum
    dirichlet-balanced  the same, but the table [classes, N] of shares is first made doubly stochastic (DynaFed's code): equal sizes
    shards              every client sees c classes, no others

alpha -> infinity is IID. alpha = 0.1 leaves most clients of `dirichlet` with two to four classes of any weight. The Dirichlet
splits share the letter and not the difficulty: never compare their alphas.

Sources: Hsu et al. 2019 (dirichlet), Li et al. 2022 (dirichlet-class), Pi et al. 2023 (dirichlet-balanced), McMahan et al. 2017 (shards).
Read next: models.py.
"""
import bisect

import numpy as np
import torch

PARTITIONS = ["iid", "dirichlet", "dirichlet-recycled", "dirichlet-class", "dirichlet-balanced", "shards"]


def partition(y, n_clients, how="dirichlet", alpha=0.1, classes_per_client=2, min_size=10, seed=0):
    """Split the images over the clients: y [n] labels -> list of n_clients sorted tensors of image numbers.

    No image is given twice, except by dirichlet-recycled. Raises ValueError for alpha <= 0, an unknown `how`, more clients than
    images, a client left without any, or an impossible minimum.  Source: see the card.
    """
    y, rng = np.asarray(y.cpu() if isinstance(y, torch.Tensor) else y), np.random.default_rng(seed)
    if not 1 <= n_clients <= len(y):
        raise ValueError(f"{n_clients} clients cannot share {len(y)} training images; clients must be in 1..{len(y)}")
    if how not in PARTITIONS:
        raise ValueError(f"unknown partition {how!r}; choose from {', '.join(PARTITIONS)}")
    if how.startswith("dirichlet") and not alpha > 0:
        raise ValueError(f"alpha = {alpha} is no Dirichlet parameter; it must be above 0")
    pools = [rng.permutation(np.flatnonzero(y == c)) for c in range(y.max() + 1)]
    if how == "iid":
        parts = np.array_split(rng.permutation(len(y)), n_clients)
    elif how in ("dirichlet", "dirichlet-recycled"):
        parts = dirichlet_per_client(pools, n_clients, alpha, rng, how == "dirichlet-recycled")
    elif how == "dirichlet-class":
        parts = dirichlet_per_class(pools, n_clients, alpha, min_size, rng)
    elif how == "dirichlet-balanced":
        parts = cut(pools, doubly_stochastic(rng.dirichlet([alpha] * n_clients, len(pools))))
    else:
        parts = shards(pools, n_clients, classes_per_client, rng)
    if min(map(len, parts)) == 0:
        raise ValueError(f"partition {how!r} leaves a client without images; take fewer clients than {n_clients} or a larger alpha")
    return [torch.from_numpy(np.sort(p)) for p in parts]


def dirichlet_per_client(pools, n_clients, alpha, rng, recycle=False):
    """Client i: class prior p_i ~ Dir(alpha); clients take turns to draw one image each, n // n_clients times.

    pools: one array [n_c] of image numbers per class -> list of arrays [n // n_clients].  A class that has run out leaves every
    prior (no image is used twice; that all clients run into this equally often is why they take turns), or with `recycle`
    is filled up again (FL-Simulator's code). Whether a rare class runs out matters: at alpha 0.1 and 100 clients priors differ
    much, so without recycling the last images of most clients come from classes they did not ask for.
    Source: Hsu et al. 2019; taking turns and drawing without replacement are this project's choice.
    """
    left = [len(p) for p in pools]
    prior = rng.dirichlet([alpha] * len(pools), n_clients) + 1e-12      # the constant keeps every class possible
    cuts, last, parts = np.cumsum(prior, 1).tolist(), len(pools) - 1, [[] for _ in range(n_clients)]
    for _ in range(sum(left) // n_clients):
        for i, r in zip(rng.permutation(n_clients).tolist(), rng.random(n_clients).tolist()):
            c = min(bisect.bisect_right(cuts[i], r * cuts[i][-1]), last)        # rounding may carry r times the sum up to the sum
            left[c] -= 1
            parts[i].append(pools[c][left[c]])
            if left[c] == 0 and recycle:
                left[c] = len(pools[c])
            elif left[c] == 0:                                          # nobody can draw this class any more
                prior[:, c] = 0
                cuts, last = np.cumsum(prior, 1).tolist(), max((k for k in range(len(left)) if left[k]), default=0)
    return [np.array(p) for p in parts]


def dirichlet_per_class(pools, n_clients, alpha, min_size, rng):
    """Class c is cut over the clients by q_c ~ Dir(alpha); then the largest clients feed those below min_size.

    pools: one array [n_c] of image numbers per class -> list of arrays of unequal length >= min_size.
    Source: Li et al. 2022 (NIID-Bench); they redraw until the minimum holds, which may never happen, so we refill.
    """
    n = sum(map(len, pools))
    if min_size * n_clients > n:
        raise ValueError(f"min_size = {min_size} images for each of {n_clients} clients are more than the {n} there are")
    parts = [part.tolist() for part in cut(pools, rng.dirichlet([alpha] * n_clients, len(pools)))]
    while min(map(len, parts)) < min_size:
        rich, poor = max(parts, key=len), min(parts, key=len)
        poor.append(rich.pop(rng.integers(len(rich))))
    return [np.array(p) for p in parts]


def cut(pools, shares):
    """Cut the images of class c, pools[c] [n_c], in proportion to shares[c] [N] -> list of N arrays [n_i].  Source: Li et al. 2022."""
    parts = [[] for _ in shares[0]]
    for pool, share in zip(pools, shares):
        for part, piece in zip(parts, np.split(pool, (np.cumsum(share)[:-1] * len(pool)).astype(int))):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def doubly_stochastic(shares, rounds=1000):
    """Scale columns and rows of shares [C, N] in turn until every row sums to 1 and every column to C / N -> [C, N].

    A client to whom no class gave anything that a float can hold gets an equal share first.
    Source: Sinkhorn and Knopp 1967; DynaFed's code, whose shares go through the same 1,000 rounds.
    """
    shares = shares + 1e-300
    for _ in range(rounds):
        shares = shares / shares.sum(0) * (len(shares) / shares.shape[1])
        shares = shares / shares.sum(1, keepdims=True)
    return shares


def shards(pools, n_clients, c, rng):
    """Every client holds c classes (fewer if its draw repeats one), and every class is shared out equally.

    pools: one array [n_c] of image numbers per class -> list of arrays.  Raises ValueError unless 1 <= c <= number of classes
    and the clients together hold every class.  Source: McMahan et al. 2017, section 3 (shards cut at class borders: ours).
    """
    C = len(pools)
    if not 1 <= c <= C or c * n_clients < C:
        raise ValueError(f"classes_per_client = {c} with {n_clients} clients cannot cover {C} classes; it must be in "
                         f"{max(1, -(-C // n_clients))}..{C}")
    deal = np.concatenate([rng.permutation(C) for _ in range(-(-c * n_clients // C))])[:c * n_clients].reshape(n_clients, c)
    parts = [[] for _ in range(n_clients)]
    for k, pool in enumerate(pools):
        holders = [i for i in range(n_clients) if k in deal[i]]
        for i, piece in zip(holders, np.array_split(pool, len(holders))):
            parts[i].extend(piece)
    return [np.array(p) for p in parts]
