"""float64 references of the kernels, and random inputs for them."""

import itertools

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ERROR = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def ints(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def attention64(queries, parts, *, scaling=None, softcap=None):
    """Output [B, H, d] and log-sum-exp [B, H] over `parts`: keys, values [B, X, n, d], valid [B, X, n], bias."""
    heads, scaling = queries.shape[1], queries.shape[3] ** -0.5 if scaling is None else scaling
    logits, values = [], []
    for *rows, bias in parts:
        keys, vals, valid = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in rows)
        x = torch.einsum("bhd,bhnd->bhn", queries[:, :, 0].double(), keys.double()) * scaling
        if softcap is not None:
            x = softcap * torch.tanh(x / softcap)
        if bias is not None:
            x = x + bias.double().repeat_interleave(heads // bias.shape[1], dim=1)
        logits.append(x.masked_fill(~valid, -torch.inf))
        values.append(vals.double())
    logits, values = torch.cat(logits, 2), torch.cat(values, 2)
    lse = logits.logsumexp(2)
    weights = torch.nan_to_num((logits - lse[..., None]).exp())
    return torch.einsum("bhn,bhnd->bhd", weights, values), lse


def error(found, expected):
    """Relative error in the norm; NaN where either is not a number."""
    found, expected = found.double(), expected.double().reshape(found.shape)
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def gathered(keys, values, ids, unit, lengths=None):
    """Selected keys, values and which are valid, token by token."""
    batch, sets, k = ids.shape
    share = sets // keys.shape[1]
    stored = keys.double().cpu(), values.double().cpu()
    rows = torch.zeros(2, batch, sets, k * unit, keys.shape[3], dtype=torch.float64)
    valid = torch.zeros(batch, sets, k * unit, dtype=torch.bool)
    limits = [keys.shape[2]] * batch if lengths is None else lengths.tolist()
    chosen = ids.tolist()
    for b, s, j, u in itertools.product(range(batch), range(sets), range(k), range(unit)):
        token = chosen[b][s][j] * unit + u
        if chosen[b][s][j] >= 0 and token < limits[b]:
            for part in range(2):
                rows[part, b, s, j * unit + u] = stored[part][b, s // share, token]
            valid[b, s, j * unit + u] = True
    return rows[0].to(DEVICE), rows[1].to(DEVICE), valid.to(DEVICE)
