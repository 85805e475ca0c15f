"""Networks as functions of ONE flat vector: apply(w, x) -> class scores, w [d], x [B, C, H, W].

When a network is a function of a single vector, every equation of every paper is a line of vector arithmetic, a
compressor acts on exactly what is sent, and `torch.func.grad(loss)(w)` has the shape of w. `torch.func.vmap` over w
trains many clients at once, with the code written for one.

    name      layers                                                                          d (28x28 grey, 10 classes)
    mlp       hidden layers of h units (one; two are the "2NN" of the FedAvg paper), ReLU     50,890 (h = 64)
    cnn       two 5x5 convolutions (a, 2a channels) with 2x2 max-pool, a hidden layer of h    54,314 (a = 8,  h = 64)
              a = 32, h = 512 is the network of the FedAvg paper: 1,663,370; a = 16, h = 128: 215,370
    lenet     two 5x5 convolutions to 64 channels, unpadded, 2x2 max-pool, hidden layers of 384 and 192   573,578
              (FL-Simulator, FedASAM, MAN)
    convnet   three blocks of 3x3 convolution to 128 channels, instance norm, ReLU, 2x2 mean-pool (DynaFed)   308,746
    resnet18  torchvision's, with every BatchNorm replaced by GroupNorm(2); for images up to 64 pixels the CIFAR stem
              (3x3, stride 1, no pool), unless stem = "imagenet" (7x7, stride 2, pool: FL-Simulator)    11,172,810

Layout of w: parameters in the order of the nn.Module, each convolution weight stored as OHWI instead of PyTorch's OIHW.
A view and a permutation then give a channels-last weight without a copy. `w.split` is used rather than slices, because
its backward is a single concatenation. ReLU stands behind the max-pool: the same function on a quarter of the entries.
No batch statistics anywhere, so the parameters are all there is to send.

`watched` is `apply` that also tells how active the hidden layers are, which MAN keeps small (`--man`, tasks.Task.loss):

    activity(x) = sum over the layers l of ||a_l||^2 / n_l        a_l [n_l] what leaves a ReLU, before pooling; not the scores

The mean of squares and not the sum, so that a layer does not count more because it is wider. Every ReLU of every network counts:
MAN names the layers of its lenet only, so for convnet and resnet18 this is ours.

Sources: cnn, McMahan et al. 2017; convnet, Pi et al. 2023 (DynaFed); GroupNorm for BatchNorm, Hsieh et al. 2020; activity,
Yashwanth et al. 2024 (MAN, arXiv 2512.08314).
Read next: fl.py.
"""
import copy
import threading
from typing import Callable, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from data import import_torchvision


class Model(NamedTuple):
    """w0 [d] initial weights, apply(w [d], x [B, C, H, W]) -> scores [B, classes], shapes of the parameters.

    watched(w [d], x) -> (the same scores, activity [B]).
    weights [d] bool: does the coordinate belong to a parameter called "weight" (and not to a bias)?  Source: ours.
    """
    w0: torch.Tensor
    apply: Callable
    shapes: list
    weights: torch.Tensor
    watched: Callable


def flatten(parameters):
    """Parameters of any shapes -> w [d], convolution weights as OHWI.  Source: ours."""
    return torch.cat([(p.permute(0, 2, 3, 1) if p.dim() == 4 else p).reshape(-1) for p in parameters])


def unflatten(w, shapes):
    """The inverse of `flatten`, without a copy: w [d] -> list of tensors of `shapes`, convolutions channels-last.  Source: ours."""
    parts = w.split([torch.Size(s).numel() for s in shapes])
    return [p.view(s[0], s[2], s[3], s[1]).permute(0, 3, 1, 2) if len(s) == 4 else p.view(s) for p, s in zip(parts, shapes)]


def watch(z, seen):
    """Look at what will enter a ReLU, z [B, ...] -> z: unless seen is None, it gets ||a||^2 / n of a = ReLU(z) [n], for each image [B].

    Here, before pooling, because MAN measures all entries, while the network may go on with fewer. Of what has left a ReLU it is
    the same number. Channels go last, where they lie in memory, and the squares are not kept: half of the added time on a CPU.
    Source: Yashwanth et al. 2024 (MAN).
    """
    if seen is not None:
        a = F.relu(z).movedim(1, -1).flatten(1)
        seen.append(torch.linalg.vecdot(a, a) / a.shape[1])
    return z


# Each network twice: the nn.Module gives the initial weights (and is the oracle of the tests), the function is what runs.
# seen: None, or the list in which a network notes how active its layers are.
def mlp_module(C, H, W, classes, hidden, depth=1):
    """nn.Module of `mlp` with `depth` hidden layers, for images [B, C, H, W].  Source: McMahan et al. 2017, whose "2NN" is depth 2."""
    layers, size = [nn.Flatten()], C * H * W
    for _ in range(depth):
        layers, size = [*layers, nn.Linear(size, hidden), nn.ReLU()], hidden
    return nn.Sequential(*layers, nn.Linear(size, classes))


def mlp(p, x, seen=None):
    """p: 2 (depth + 1) parameters, x [B, C, H, W] -> scores [B, classes].  Source: as mlp_module."""
    x = x.flatten(1)
    for weight, bias in zip(p[:-2:2], p[1:-2:2]):
        x = F.relu(watch(F.linear(x, weight, bias), seen))
    return F.linear(x, p[-2], p[-1])


def cnn_module(C, H, W, classes, width, hidden):
    """nn.Module of `cnn`, for images [B, C, H, W].  Source: McMahan et al. 2017, section 3."""
    return nn.Sequential(
        nn.Conv2d(C, width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * (H // 4) * (W // 4), hidden), nn.ReLU(), nn.Linear(hidden, classes))


def cnn(p, x, seen=None, padding=2):
    """p: 4 parameters of convolutions and those of an mlp, x [B, C, H, W] -> scores [B, classes].  Source: as cnn_module."""
    for weight, bias in ((p[0], p[1]), (p[2], p[3])):
        x = F.relu(F.max_pool2d(watch(F.conv2d(x, weight, bias, padding=padding), seen), 2))
    return mlp(p[4:], x, seen)


def lenet_module(C, H, W, classes):
    """nn.Module of `lenet`, for images [B, C, H, W].  Source: the code of Caldarola et al. 2022, FL-Simulator and MAN."""
    side = lambda s: ((s - 4) // 2 - 4) // 2                                                       # noqa: E731
    return nn.Sequential(
        nn.Conv2d(C, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * side(H) * side(W), 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, classes))


def lenet(p, x, seen=None):
    """p: 10 parameters, x [B, C, H, W] -> scores [B, classes].  Source: as lenet_module."""
    return cnn(p, x, seen, padding=0)


def convnet_module(C, H, W, classes, width=128):
    """nn.Module of `convnet`, for images [B, C, H, W].  Source: Pi et al. 2023 (instance norm = GroupNorm of C groups)."""
    blocks = []
    for c in (C, width, width):
        blocks += [nn.Conv2d(c, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width * (H // 8) * (W // 8), classes))


def convnet(p, x, seen=None):
    """p: 14 parameters, x [B, C, H, W] -> scores [B, classes].  Source: as convnet_module."""
    for i in (0, 4, 8):
        x = F.conv2d(x, p[i], p[i + 1], padding=1)
        x = F.avg_pool2d(F.relu(watch(F.group_norm(x, x.shape[1], p[i + 2], p[i + 3]), seen)), 2)
    return F.linear(x.flatten(1), p[12], p[13])


def resnet18_module(C, H, W, classes, stem="auto"):
    """nn.Module of `resnet18`, for images [B, C, H, W].  Source: He et al. 2016; GroupNorm(2), Hsieh et al. 2020."""
    net = import_torchvision().models.resnet18(num_classes=classes, norm_layer=lambda c: nn.GroupNorm(2, c))
    if max(H, W) <= 64 and stem == "auto":
        net.conv1, net.maxpool = nn.Conv2d(C, 64, 3, padding=1, bias=False), nn.Identity()
        net.avgpool = nn.AvgPool2d((-(-H // 8), -(-W // 8)))       # the same mean as the adaptive pool, which vmap runs slowly
    elif C != 3:
        net.conv1 = nn.Conv2d(C, 64, 7, stride=2, padding=3, bias=False)
    return net


def functional(module):
    """Any nn.Module as a function of its parameters: -> apply(p, x [B, C, H, W], seen).

    `functional_call` swaps parameters inside the module while it runs, so every thread gets a copy. Its nn.ReLU modules, some of
    which are called twice, note what leaves them (hooks).  Source: torch.func.
    """
    names, local = [n for n, _ in module.named_parameters()], threading.local()

    def apply(p, x, seen=None):
        if not hasattr(local, "net"):
            local.net = copy.deepcopy(module)
            for m in local.net.modules():
                if isinstance(m, nn.ReLU):
                    m.register_forward_hook(lambda m, x, a: watch(a, local.seen))
        local.seen = seen
        scores = torch.func.functional_call(local.net, dict(zip(names, p)), x)
        local.seen = None                                          # it would keep the graph of this call alive
        return scores
    return apply


MODELS = ["mlp", "cnn", "lenet", "convnet", "resnet18"]


def build(name, image_shape, classes, width=8, hidden=64, seed=0, device="cpu", dtype=torch.float32, depth=1, stem="auto"):
    """A network for images [C, H, W]: -> Model with w0 [d] from PyTorch's default initialisation.

    width: channels of cnn's first layer; hidden: units of cnn's hidden layer or of mlp's, of which there are
    `depth`. Raises ValueError for an unknown
    name.  Source: each network names its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            module, function = mlp_module(*image_shape, classes, hidden, depth), mlp
        elif name == "cnn":
            module, function = cnn_module(*image_shape, classes, width, hidden), cnn
        elif name == "lenet":
            module, function = lenet_module(*image_shape, classes), lenet
        elif name == "convnet":
            module, function = convnet_module(*image_shape, classes), convnet
        elif name == "resnet18":
            module = resnet18_module(*image_shape, classes, stem)
            function = functional(module.requires_grad_(False))
        else:
            raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    shapes = [p.shape for p in module.parameters()]
    weights = torch.cat([torch.full((p.numel(),), "weight" in n) for n, p in module.named_parameters()])

    def apply(w, x, seen=None):
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)         # channels-last, in a way that vmap knows
        return function(unflatten(w, shapes), x, seen)

    def watched(w, x):
        seen = []
        return apply(w, x, seen), sum(seen)
    return Model(flatten(p.detach() for p in module.parameters()).to(device, dtype), apply, shapes, weights.to(device), watched)
