r"""What a Kalman step over a whole image tower costs, in multiples of a full fine-tuning step of AdamW.

    python -m benchmarks.tower_cost --json                               a small ViT, batch 32: one line per method
    python -m benchmarks.tower_cost --model ViT-B-32 --threads 2         any model of open_clip, with random weights
    python -m benchmarks.tower_cost --model embedded --method adamw,ekf  the mini CLIP of the package, convolutional
    python -m benchmarks.tower_cost --device cuda --precision bfloat16 --model ViT-B-16
    python -m benchmarks.tower_cost --out benchmarks/results             add what is measured to tower_cost.json
    python -m benchmarks.tower_cost --markdown                           put its tables into benchmarks/README.md

A step is all of ``KalmanNGD.step`` or ``GradientDescent.step`` on the same pictures, already decoded. The
methods take turns in one process; memory is that of a fresh process for each: on a CPU the peak of the resident set
above what it was with the network and the batch in memory, on CUDA ``max_memory_allocated`` above the same. *CPU time*
is the time that the process had a core for, which says more than wall time where a machine does other things as well.

The floor counts multiply-adds of products with weights, two FLOPs each, in units of the forward pass. With m samples of
one observation, M = m, T tokens (for a convolution: places of its output) and layers (o, i) ::

    u = sum over layers of 2 m T o i                the forward pass
    v = sum over layers of M (M + 1) o i            half of an (M, M) product over all weights: u times (M + 1) / 2 T

    method         FLOPs                 what for                                                  T = 50, m = 32
    adamw          3 u                   forward, derivatives to inputs, weight gradients          3.00 u
    ekf            4 u + 2 v             forward, derivatives; rows of H for S, and again for P;   4.66 u   1.55x
                                         S = H P H^T and L^-1 H, of which half are other numbers
    vdekf          4 u + v               the same without L^-1 H                                   4.33 u   1.44x
    ekf, q draws   4 u + v + 2 q M o i   q rows of L^-T z H in the place of L^-1 H                 4.33 u + q u / T

Depthwise convolutions, attention, norms and activations are in no floor. Rows are formed twice, because all of them
would be m times the weights; the mean step is one row more of the second product, not a pass of its own. torch offers
no product that computes half of a symmetric or triangular result: as done, v counts twice, 5.28 u and 1.76x for ekf at
T = 50. Rows themselves stay in a cache, a tile at a time, and are passed over four times: scaled by P^1/2, multiplied,
squared, summed. Bytes are those of weights and state, 28 n for AdamW (read p, g, m, v; write p, m, v) and 24 n for the
filter (read theta and P twice, write both once) ::

    floor = max(FLOPs / rate of a 1024^3 product, bytes / rate of a 256 MB copy)

Memory at the end of the backward pass: AdamW has 3 n above the weights (gradient, moments) and its activations; the
filter P, the input x of each layer and the derivative g of its output. In a block of a ViT of width d these are, of
m T d numbers, 16 activations against 9 of x and 11 of g. So the filter needs more only where 4 m T d > 2 * 12 d^2, that
is m T > 6 d.
"""
