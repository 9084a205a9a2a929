r"""A prior over functions, measured on the shots: how much a linear layer's outputs may vary, and with what.

A covariance A (i, i) over the columns of a weight says how alike a layer's outputs are a priori, x^T A x'.
Here it is taken from the shots so that it means the same in any coordinates of the features ::

    k(x, x') = (x - c)^T M (x' - c) / r^2 + bias          x with a constant 1 behind it

* ``M = (W + shrinkage w I)^-1`` is the metric in which pictures of one class form a ball: W their covariance within
  classes, w its typical eigenvalue, tr(W^2) / tr(W). It does not change when features are rotated, or gain coordinates
  in which nothing varies.
* ``c`` is the offset that all images share, the cone of a CLIP. The mean of a few shots contains more, such as their
  drawing style, which images out of distribution do not share. Measured from that mean, such images would be moved by
  all that was learned. But shots vary along what is particular to them. So c is their mean less the directions along
  which they vary, ridge regression's point of least norm in their affine hull: ``c = reach t (V + reach t I)^-1 mean``,
  V the covariance of all shots and t its typical eigenvalue.
* ``r^2`` is the mean of ``(x - mean)^T M (x - mean)`` over the shots: k varies by 1 around them.
"""

from kngd_ray._deferred import Tensor, functional, torch
from kngd_ray.filters.dense import symmetric
from kngd_ray.filters.left_out import PriorWithout

_FEW = 64  # shots, so few that each matters to the offset


def class_means(x: Tensor, labels: Tensor) -> Tensor:
    """Mean input of each class.

    Args:
        x: (N, i) inputs.
        labels: (N,) int64 classes.

    Returns:
        (C, i), with C one more than the largest label; 0 for a class without inputs.
    """
    # as a product, whose sums are in the same order on every device and in every run
    members = functional.one_hot(labels).to(x)
    return members.mT @ x / members.sum(0).clamp_min(1).unsqueeze(1)


def within_class_covariance(x: Tensor, labels: Tensor) -> Tensor:
    """How inputs vary within their classes.

    Args:
        x: (N, i) inputs.
        labels: (N,) int64 classes.

    Returns:
        (i, i) pooled covariance; 0 where no class has two inputs.
    """
    scatter, _, freedom = _within(x, labels)
    return scatter / freedom


def _within(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """The scatter (i, i) of inputs within their classes, the means (C, i) of these and the degrees of freedom."""
    means = class_means(x, labels)
    rest = x - means[labels]
    return rest.mT @ rest, means, max(len(x) - len(labels.unique()), 1)


def typical(P: Tensor) -> Tensor:
    """Typical eigenvalue of a covariance: the mean of all, each weighted by itself.

    Args:
        P: (i, i) covariance.

    Returns:
        Scalar tr(P^2) / tr(P); 0 of the zero matrix.
    """
    trace = P.diagonal().sum()
    return P.square().sum() / trace if trace > 0 else trace


def common_offset(x: Tensor, reach: float) -> Tensor:
    """The offset that all images share, as far as shots can tell.

    Args:
        x: (N, i) inputs.
        reach: variance, in units of the typical one, along which half of the mean counts as particular to the shots.

    Returns:
        (i,) c.
    """
    mean = x.mean(0)
    centred = x - mean
    if len(x) > x.shape[1]:
        return _offset(mean, symmetric(centred.mT @ centred) / len(x), reach)
    gram = symmetric(centred @ centred.mT) / len(x)  # V has no more axes than there are shots
    ridge = reach * typical(gram)
    if not ridge > 0:
        return mean
    gram.diagonal().add_(ridge)
    inner = torch.linalg.solve(gram, centred @ mean / len(x))
    return mean - centred.mT @ inner


def _offset(mean: Tensor, V: Tensor, reach: float) -> Tensor:
    """The common offset (i,) of shots with mean (i,) and covariance V (i, i), which is changed in place."""
    ridge = reach * typical(V)
    if not ridge > 0:
        return mean
    V.diagonal().add_(ridge)
    return ridge * torch.linalg.solve(V, mean)


def measured_columns(x: Tensor, labels: Tensor, *, shrinkage: float, reach: float, bias: float) -> Tensor:
    """The covariance of columns that shots give.

    Args:
        x: (N, i) inputs of the layer; where their last column is 1, offset and bias are part of it.
        labels: (N,) int64 classes.
        shrinkage: of the metric towards the features' Euclidean one, in typical variances within classes.
        reach: as of :func:`common_offset`.
        bias: variance of the output at the offset, in units of its variance around the shots' mean.

    Returns:
        (i, i) A with tr(A) = i; the identity where the shots do not vary.
    """
    i = x.shape[1]
    constant = i > 1 and bool((x[:, -1] == 1).all())
    features = x[:, :-1] if constant else x
    mean = features.mean(0)
    W, V = _scatters(features - mean, labels)
    ridge = shrinkage * typical(W)
    M = torch.eye(len(W), dtype=W.dtype, device=W.device)
    if _tells(ridge, features):
        M = torch.cholesky_inverse(torch.linalg.cholesky(M.add_(W / ridge)))
    varied = (M * V).sum()
    if not varied > 0:
        return torch.eye(i, dtype=x.dtype, device=x.device)
    if not constant:
        return M * (i / M.diagonal().sum())
    c = _offset(mean, V, reach) if len(x) > len(mean) else common_offset(features, reach)
    A = x.new_empty(i, i)
    A[:-1, :-1], A[-1, :-1] = M, -(M @ c)
    A[:-1, -1] = A[-1, :-1]
    A[-1, -1] = c @ M @ c + bias * varied
    return A.mul_(i / A.diagonal().sum())


def _scatters(centred: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The covariances (i, i) of centred inputs (N, i) within classes and in all, from one product.

    The covariance in all is the one within classes plus that of the classes' means: a sum, which loses no digits. Where
    no class has two inputs, the first is exactly 0.
    """
    within, means, freedom = _within(centred, labels)
    sizes = torch.bincount(labels).to(centred)
    total = torch.addmm(within, (means * sizes.unsqueeze(1)).mT, means)
    return within / freedom, total / len(centred)


def measured_without(
    A: Tensor, x: Tensor, labels: Tensor, *, shrinkage: float, reach: float, views: int = 1
) -> PriorWithout:
    """How a covariance that :func:`measured_columns` took from pictures would change without each of them.

    Without a picture of v views, W lacks the views' deviations from their own mean. It also lacks that mean's deviation
    from the class's, times v k / (k - v) where the class has k samples. The offset is measured anew where there are
    only a handful of pictures; with more it hardly moves.

    Args:
        A: (i, i) float64, a multiple of the measured covariance.
        x: (N, i) float64 inputs that it was measured on.
        labels: (N,) int64 classes.
        shrinkage: as of :func:`measured_columns`.
        reach: likewise.
        views: samples of each picture, one after another.

    Returns:
        The changes of A^-1.
    """
    pictures, of_picture = len(x) // views, labels[::views]
    constant = x.shape[1] > 1 and bool((x[:, -1] == 1).all())
    features, metric = (x[:, :-1], A[:-1, :-1]) if constant else (x, A)
    scatter, means, freedom = _within(features, labels)
    W, k = scatter / freedom, torch.bincount(labels)[of_picture].to(x)
    by_picture = features.unflatten(0, (pictures, views))
    ridge = shrinkage * typical(W)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(metric))
    vectors, weights = [], []
    if _tells(ridge, features):
        # A's metric is a multiple of (W / ridge + I)^-1
        unit = precision.diagonal().sum() / (W.diagonal().sum() / ridge + len(W))
        unit = unit / (freedom * ridge)
        own_mean = by_picture.mean(1)
        between = torch.where(k > views, views * k / (k - views).clamp_min(1), 0.0)
        vectors.append((own_mean - means[of_picture]).unsqueeze(1))
        weights.append((-unit * between).unsqueeze(1))
        if views > 1:
            vectors.append(by_picture - own_mean.unsqueeze(1))
            weights.append((-unit).expand(pictures, views))
    if constant:
        vectors = [functional.pad(e, (0, 1)) for e in vectors]
        if pictures <= _FEW:
            # A^-1 holds [c, 1] [c, 1]^T / (bias r^2), of the offset c; without a bias it is singular there
            c = -precision @ A[:-1, -1]
            bias = A[-1, -1] - c @ metric @ c
            if bias > torch.finfo(torch.float32).eps * A[-1, -1]:
                each = torch.arange(pictures, device=x.device)
                without = torch.stack([
                    common_offset(by_picture[each != n].flatten(0, 1), reach) if pictures > 1 else c for n in each
                ])
                offsets = torch.stack([c.expand_as(without), without], 1)
                vectors.append(functional.pad(offsets, (0, 1), value=1.0))
                weights.append(torch.stack([-1 / bias, 1 / bias]).expand(pictures, 2))
    if not vectors:
        return PriorWithout.unchanged(pictures, x)
    return PriorWithout(torch.cat(vectors, 1), torch.cat(weights, 1))


def _tells(ridge: Tensor, features: Tensor) -> bool:
    """Whether shots say how pictures vary: not where the shots of a class are equal up to rounding."""
    return bool(ridge > torch.finfo(torch.float32).eps * features.square().sum(1).mean())
