"""Networks as functions of ONE flat vector: apply(w [d], x [B, C, H, W]) -> scores [B, classes].

With a single vector, every equation of a paper is one line of vector arithmetic, a compressor acts
on exactly what is sent, and `torch.func.grad(loss)(w)` has the shape of w. `torch.func.vmap` over w
trains many clients at once, with the code written for one.

    name      layers                                                d (28x28 grey, 10 classes)
    mlp       `depth` hidden layers of `hidden` units                  50,890 (1 layer of 64)
    cnn       two 5x5 convolutions to `width` and 2 `width`            54,314 (8, 64)
              channels, each with 2x2 max-pooling; then a           1,663,370 (32, 512)
              hidden layer of `hidden` units
    lenet     two 5x5 convolutions to 64 channels, no padding,        573,578
              2x2 max-pooling; hidden layers of 384 and 192 units
    convnet   three blocks: 3x3 convolution to 128 channels,          308,746
              instance norm, ReLU, 2x2 mean-pooling
    resnet18  torchvision's, with GroupNorm(2) for BatchNorm       11,172,810

A reader's own network is any nn.Module whose constructor takes (image_shape, classes). What is
Annotated among its keyword parameters becomes a setting.

All that is learnt must be in w, and the scores of an image must depend on w and this image only. So
`build` refuses BatchNorm, which mixes the images of a batch and keeps running statistics, any other
buffer, and Dropout.

`watched` is `apply` that also measures how active the hidden layers are (MAN keeps this small):

    activity(x) = sum over ReLUs l of ||a_l||^2 / n_l       a_l [n_l] leaves ReLU l, before pooling

MAN measures its lenet; that all ReLUs of the other networks count is this project's choice.

Sources: cnn and mlp, McMahan et al. 2017 (width 32, hidden 512; depth 2, hidden 200 is its "2NN").
lenet, Caldarola et al. 2022, FL-Simulator and MAN. convnet, Pi et al. 2023 (DynaFed). resnet18, He
et al. 2016; GroupNorm for BatchNorm, Hsieh et al. 2020. Activity, Yashwanth et al. 2024 (MAN).
"""

import copy
import threading
from typing import Annotated, Literal

import torch
from torch import nn
from torch.nn import functional as F

from vision.data import import_torchvision

# ------------------------------------------------------------------------------------ the networks


class ReLU(nn.Module):
    """ReLU and then max-pooling over pool x pool pixels, in the faster order.

    Pooling first gives the same numbers, and ReLU then has pool^2 times fewer of them to do.
    """

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, z):
        return F.relu(F.max_pool2d(z, self.pool))


class MLP(nn.Sequential):
    """Fully connected layers."""

    def __init__(
        self,
        image_shape,
        classes,
        *,
        hidden: Annotated[int, "units of a hidden layer", 1, 8192] = 64,
        depth: Annotated[int, "hidden layers of mlp", 1, 100] = 1,
    ):
        C, H, W = image_shape
        sizes = [C * H * W] + depth * [hidden]
        layers = [nn.Flatten()]
        for size, following in zip(sizes, sizes[1:]):
            layers += [nn.Linear(size, following), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden, classes))


class CNN(nn.Sequential):
    """Two convolutions, then a hidden layer."""

    def __init__(
        self,
        image_shape,
        classes,
        *,
        width: Annotated[int, "channels of cnn's first layer", 1, 512] = 8,
        hidden: Annotated[int, "units of a hidden layer", 1, 8192] = 64,
    ):
        C, H, W = image_shape
        super().__init__(
            nn.Conv2d(C, width, 5, padding=2),
            ReLU(pool=2),
            nn.Conv2d(width, 2 * width, 5, padding=2),
            ReLU(pool=2),
            nn.Flatten(),
            nn.Linear(2 * width * (H // 4) * (W // 4), hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )


class LeNet(nn.Sequential):
    """Two convolutions without padding, then two hidden layers; for images of 16 pixels or more."""

    def __init__(self, image_shape, classes):
        C, H, W = image_shape
        if min(H, W) < 16:
            raise ValueError(f"lenet needs images of at least 16x16 pixels; these are {H}x{W}")
        after = [
            ((side - 4) // 2 - 4) // 2 for side in (H, W)
        ]  # a 5x5 window loses 4, pooling halves
        super().__init__(
            nn.Conv2d(C, 64, 5),
            ReLU(pool=2),
            nn.Conv2d(64, 64, 5),
            ReLU(pool=2),
            nn.Flatten(),
            nn.Linear(64 * after[0] * after[1], 384),
            nn.ReLU(),
            nn.Linear(384, 192),
            nn.ReLU(),
            nn.Linear(192, classes),
        )


class ConvNet(nn.Sequential):
    """Three convolutions with instance norm, which is GroupNorm with one channel in each group."""

    def __init__(self, image_shape, classes):
        C, H, W = image_shape
        layers = []
        for channels in (C, 128, 128):
            layers += [nn.Conv2d(channels, 128, 3, padding=1), nn.GroupNorm(128, 128)]
            layers += [nn.ReLU(), nn.AvgPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(128 * (H // 8) * (W // 8), classes)]
        super().__init__(*layers)


class ResNet18(nn.Module):
    """torchvision's ResNet-18 with GroupNorm(2), and a stem for small images.

    The usual stem halves height and width twice, which leaves too little of 32x32 pixels.
    """

    def __init__(
        self,
        image_shape,
        classes,
        *,
        stem: Annotated[
            Literal["auto", "imagenet"],
            "resnet18: first layers; auto is 3x3 without a pool for images up to 64 pixels, "
            "imagenet 7x7 with stride and pool",
        ] = "auto",
    ):
        super().__init__()
        C, H, W = image_shape
        resnet18 = import_torchvision().models.resnet18
        self.net = resnet18(num_classes=classes, norm_layer=lambda width: nn.GroupNorm(2, width))
        if max(H, W) <= 64 and stem == "auto":
            self.net.conv1 = nn.Conv2d(C, 64, 3, padding=1, bias=False)
            self.net.maxpool = nn.Identity()
            # the same mean as the adaptive pool, which vmap runs slowly
            self.net.avgpool = nn.AvgPool2d((-(-H // 8), -(-W // 8)))
        elif C != 3:
            self.net.conv1 = nn.Conv2d(C, 64, 7, stride=2, padding=3, bias=False)

    def forward(self, x):
        return self.net(x)


NETWORKS = {"mlp": MLP, "cnn": CNN, "lenet": LeNet, "convnet": ConvNet, "resnet18": ResNet18}

# ---------------------------------------------------------------- from a module to a function of w


def build(network, image_shape, classes, seed=0, device="cpu", dtype=torch.float32, **settings):
    """A network with PyTorch's default initial parameters, as a function of w -> Model.

    network: a name, or a class with the constructor (image_shape (C, H, W), classes, **settings).
    Raises ValueError for a network that w alone cannot describe.
    """
    network = NETWORKS.get(network, network)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = network(image_shape, classes, **settings)
        check(module, image_shape, classes)
    return Model(module, device, dtype)


class Model:
    """A network as a function of its parameters.

    w0 [d]         initial parameters
    shapes         of the parameters, in their order in w
    weights [d]    bool: does it belong to a parameter called "weight", and not to a bias?
    """

    def __init__(self, module, device, dtype):
        named = dict(module.named_parameters())
        self.shapes = [p.shape for p in named.values()]
        self.w0 = flatten(p.detach() for p in named.values()).to(device, dtype)
        is_weight = []
        for name, p in named.items():
            _, _, last = name.rpartition(".")  # "weight" of "first.weight"
            is_weight.append(torch.full_like(p, "weight" in last, dtype=torch.bool))
        self.weights = flatten(is_weight).to(device)
        self.emptied = emptied(module)
        self.local = threading.local()

    def apply(self, w, x):
        """Scores [B, classes] of images x [B, C, H, W] at w [d]."""
        module, places = self.mine()
        parameters = unflatten(w, self.shapes)
        for layer, name, k in places:
            vars(layer)[name] = parameters[k]
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels last, also under vmap
        scores = module(x)
        for layer, name, _ in places:
            vars(layer)[name] = None  # otherwise the graph of this call stays in memory
        return scores

    def mine(self):
        """This thread's copy of the module, because `apply` changes it."""
        if not hasattr(self.local, "copy"):
            self.local.copy = copy.deepcopy(self.emptied)
        return self.local.copy

    def watched(self, w, x):
        """The same scores, and the activity [B] of the images."""
        activity = []

        def look(layer, inputs):
            activity.append(mean_square(F.relu(inputs[0])))

        module, _ = self.mine()
        relus = [layer for layer in module.modules() if isinstance(layer, (nn.ReLU, ReLU))]
        if not relus:
            raise ValueError(f"MAN needs a network with nn.ReLU layers; {kind(module)} has none")
        hooks = [layer.register_forward_pre_hook(look) for layer in relus]
        try:
            scores = self.apply(w, x)
        finally:
            for hook in hooks:
                hook.remove()
        return scores, sum(activity)


def emptied(module):
    """Take the parameters out of a module -> (module, [(layer, name, number of the parameter)]).

    Tensors can then be set in their places. torch.func.functional_call does the same with more
    care; with it, a step of cnn takes 5 % longer.
    """
    number = {p: k for k, p in enumerate(module.parameters())}  # what two layers share is one
    places = []
    for layer in module.modules():
        for name, p in list(layer.named_parameters(recurse=False, remove_duplicate=False)):
            places.append((layer, name, number[p]))
            delattr(layer, name)
    return module, places


def mean_square(a):
    """The mean square of the numbers of each image, in any shape: a [B, ...] -> [B]."""
    a = a.movedim(1, -1).flatten(1)  # channels last, as they lie in memory
    return torch.linalg.vecdot(a, a) / a.shape[1]  # keeps no squares for the gradient


# ------------------------------------------------------------------------- the layout of w


def flatten(parameters):
    """Parameters of any shapes -> w [d], the weights of convolutions as [out, H, W, in]."""
    return torch.cat([channels_last(p).reshape(-1) for p in parameters])


def channels_last(p):
    return p.permute(0, 2, 3, 1) if p.dim() == 4 else p


def unflatten(w, shapes):
    """The inverse of `flatten`: w [d] -> views of it, one for each of the shapes.

    The weights of a convolution are thus channels-last, which is fast on CPUs and GPUs: with
    PyTorch's [out, in, H, W] in w, a step of cnn takes 1.3 to 1.4 times as long (CPU).
    """
    parts = w.split([shape.numel() for shape in shapes])  # its gradient is one concatenation
    return [view(part, shape) for part, shape in zip(parts, shapes)]


def view(part, shape):
    """A part of w as a parameter of this shape."""
    if len(shape) != 4:
        return part.view(shape)
    out, channels, H, W = shape
    return part.view(out, H, W, channels).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------ what is refused


def check(module, image_shape, classes):
    """Raise ValueError unless the module is a function of its parameters and of single images."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            trouble = "mixes the images of a batch; take nn.GroupNorm instead"
            raise ValueError(f"layer {name!r} is {kind(layer)}, which {trouble}")
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            trouble = "draws its own random numbers; leave it out (norms: take nn.GroupNorm)"
            raise ValueError(f"layer {name!r} is {kind(layer)}, which {trouble}")
    for name, _ in module.named_buffers():
        trouble = "would not be sent; use a parameter, or nn.GroupNorm for a norm with statistics"
        raise ValueError(f"{name!r} is a buffer, which {trouble}")
    check_scores(module, image_shape, classes)


def check_scores(module, image_shape, classes):
    """Run the module on two images, which also gives lazy layers their shapes."""
    x = torch.rand(2, *image_shape)
    with torch.no_grad():
        first, second = module(x), module(x)
    if first.shape != (2, classes):
        found, expected = list(first.shape), [2, classes]
        raise ValueError(f"{kind(module)} turns 2 images into {found}; expected {expected}")
    if not torch.equal(first, second):
        trouble = "gives other scores when it is called again; it must not draw random numbers"
        raise ValueError(f"{kind(module)} {trouble}")


def kind(module):
    return type(module).__name__
