"""check_compressor(C): does a compressor, also one of your own, keep its word?

    python -m pytest test_all.py --compressor mine.py:MyCompressor

It checks what compress.py asks of every compressor, with the default settings:

    bytes       `encode` makes a uint8 tensor [bytes], the same again from the same generator, and
                leaves x as it was
    decoding    `decode` needs nothing but the buffer and d, and gives a finite vector [d]
    damage      a bit that is flipped, a byte too many or too few is a ValueError (`seal`, `unseal`)
    forgery     other bytes with a true checksum are a ValueError, or finite numbers
    zeros       zeros arrive as zeros
    large       large numbers arrive as finite ones
    unbiased    unless the class says `unbiased = False`, the mean of many x_hat is x. A biased
                compressor that does not say so would get no error feedback
    contractive a biased one that does not say `contractive = False` brings x_hat nearer to x than 0
                is; otherwise error feedback piles up an error

What it cannot see: whether the bytes are as few as the paper says.
"""

import torch

import compress

TRIALS = 400
UNSEAL = "use compress.seal and unseal, and compress.expect the length of each field"


def check_compressor(C):
    """Raises AssertionError with a sentence that says what the class C does not keep."""
    x = torch.randn(600, generator=seeded(0))
    x[256:] /= 100  # several buckets, of different scales
    for some in (x[:60], x):
        check_bytes(C, some)
        check_error(C, some)
    check_damage(C(), x[:60])
    check_forgery(C(), x[:60])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def check_bytes(C, x):
    before, c = x.clone(), C()
    buffer = c.encode(x, seeded(1))
    ok = isinstance(buffer, torch.Tensor) and (buffer.dtype, buffer.dim()) == (torch.uint8, 1)
    assert ok, f"{C.__name__}: `encode` makes no uint8 tensor [bytes]; compress.to_bytes makes one"
    assert torch.equal(x, before), f"{C.__name__}: `encode` changes x in place"
    again = torch.equal(c.encode(x, seeded(1)), buffer)
    assert again, f"{C.__name__}: two buffers differ; draw random numbers from `generator` only"
    try:
        x_hat, zeros = C().decode(buffer, len(x)), through(C, 0 * x)
    except AttributeError as error:
        raise AssertionError(f"{C.__name__}: `decode` needs what only `encode` knows: {error}")
    ok = x_hat.shape == x.shape and x_hat.isfinite().all()
    assert ok, f"{C.__name__}: `decode` gives no finite vector [d]"
    assert torch.equal(x_hat, c.decode(buffer, len(x))), (
        f"{C.__name__}: `decode` needs more than the buffer and d; put it into the buffer"
    )
    assert not zeros.any(), f"{C.__name__}: zeros do not arrive as zeros"
    large = through(C, 1e30 * x).isfinite().all()
    assert large, f"{C.__name__}: numbers around 1e30 arrive as numbers that are not finite"


def through(C, x, seed=1):
    """x [d] as it arrives."""
    return C().decode(C().encode(x, seeded(seed)), len(x)).to(x.dtype)


def check_damage(c, x):
    buffer = c.encode(x, seeded(1))
    bad = {"text in its place": b"text", "floats in it": buffer.float()}
    bad |= {"two dimensions": buffer[None], "a byte too many": torch.cat([buffer, buffer[:1]])}
    bad |= {"a byte too many, but sealed": compress.seal(buffer[:-4], buffer[:1] * 0)}
    bad |= {"a byte too few, but sealed": compress.seal(buffer[:-5])}
    for place in range(len(buffer)):
        flipped = buffer.clone()
        flipped[place] ^= 1 << place % 8
        bad |= {f"a bit of byte {place} flipped": flipped, f"{place} bytes only": buffer[:place]}
    for what, damaged in bad.items():
        said = f"{type(c).__name__}: `decode` reads a buffer with {what}; {UNSEAL}"
        assert read(c, damaged, x) is None, said


def check_forgery(c, x):
    body = c.encode(x, seeded(1))[:-4]
    forged = [body[:n] for n in range(len(body))]
    for seed in range(200):
        forged.append(torch.randint(256, body.shape, generator=seeded(seed), dtype=torch.uint8))
    for bit in range(8 * len(body)):
        forged.append(body.clone())
        forged[-1][bit // 8] ^= 1 << bit % 8
    for other in forged:
        x_hat = read(c, compress.seal(other), x)
        assert x_hat is None or x_hat.isfinite().all(), (
            f"{type(c).__name__}: `decode` makes numbers that are not finite of a forged buffer; "
            "raise ValueError if a field holds what `encode` never writes"
        )


def read(c, buffer, x):
    """What c decodes, or None if it raises ValueError."""
    try:
        return c.decode(buffer, len(x))
    except ValueError:
        return None
    except Exception as error:
        text = f"{type(c).__name__}: a damaged buffer ends in {error!r}, not in ValueError"
        raise AssertionError(f"{text}; {UNSEAL}") from error


def check_error(C, x):
    arrived = torch.stack([through(C, x, seed) for seed in range(TRIALS)]).double()
    bias = (arrived.mean(0) - x).square().sum()
    chance = arrived.var(0).sum() / TRIALS  # its mean, if x_hat is unbiased
    if getattr(C(), "unbiased", True):
        assert bias <= 3 * chance + 1e-12 * x.square().sum(), (
            f"{C.__name__}: the mean of {TRIALS} x_hat is not x. If it is not meant to be, say "
            "`unbiased = False`, and error feedback is on by itself"
        )
    elif getattr(C(), "contractive", True):
        error = (arrived - x).square().sum(1).mean() / x.square().sum()
        assert error < 1, (
            f"{C.__name__}: ||x_hat - x||^2 is {error:.2f} ||x||^2, so error feedback does not "
            "fit; say `contractive = False`"
        )
