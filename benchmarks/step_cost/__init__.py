r"""What a Kalman step costs, in time and memory, as multiples of an AdamW step.

    python -m benchmarks.step_cost                          everything, tables on stdout, about 6 minutes on two cores
    python -m benchmarks.step_cost --quick --json           the main cases with few repeats, under a minute
    python -m benchmarks.step_cost --out benchmarks/results step_cost.json with its environment, and the plots
    python -m benchmarks.step_cost --markdown               put the tables of that run into benchmarks/README.md

A step is ``KalmanNGD.step`` or ``GradientDescent.step``, all of it: forward, observation or loss, update, the figures
that a step reports. The methods of a case run on the same head and batch in one process and in turns. Rows of
device ``cuda`` appear where there is one. ``naive`` forms all rows of H, and is where one would start from.

Every time stands beside a floor that is predicted before it is measured ::

    floor = max(FLOPs / rate of a 1024^3 float32 product, bytes / rate of a 256 MB copy)

The product is made as filters make large ones, at the higher rate where a processor has two. Of the bottleneck
512-128-512 with s = 32 AdamW takes 21 MFLOP, kronecker 78, vdekf 168, ekf 298. At 106 GFLOP/s, which MKL reaches on one
core of an AMD EPYC, that is 0.2, 0.7, 1.6 and 2.8 ms; at the 235 of oneDNN 0.1, 0.3, 0.7 and 1.3.

Both rates are measured first, on the same device with the same number of threads. FLOPs are those of the products with
n-sized or (o, i)-sized operands, a multiply-add being two, symmetric results half; bytes those of what a step must
read and write of its weights and state, each tensor once for each phase that must wait for the one before. State that
fits into a cache can beat the bytes. With s samples of k observations, M = s k, layers (o, i), n = sum o i, and n' the
weights behind the first layer, through which derivatives pass:

    method           FLOPs                                                      bytes
    adamw            2 s (2 n + n')             forward, weight gradients,      28 n     read p, g, m, v; write p, m, v
                                                derivatives
    every filter     4 s n + 2 M n' + M^3       forward, H^T w, derivatives,    12 n     read theta twice, write it
                                                S^-1
    + diagonal ekf   2 s (s + 1) n              S and diag(H^T S^-1 H), over    12 n     read P twice, write it
                                                pairs of samples a <= b
    + diagonal vdekf s (s + 1) n + 2 s n        S, and diag(H^T H)              12 n
    + kronecker      3 (s i^2 + M o^2)          X A and G B, X A^T (.) X A      12 (i^2 + o^2)
                     + 3 (s^2 i + M^2 o)        N and K, and their products     for each layer
    + block_diagonal 3 s N + 2 s^2 n            P x and what P loses; S, and    12 N     N numbers in the blocks
                                                S^-1 between P x
    + low rank r     s (s + 3) n + 6 s r n      H lam^-1 H^T, energies; H W,    12 (r + 1) n
                     + 4 r^2 n                  H lam^-1 W, H^T V; W^T W,
                                                W^T lam^-1 W, W V
    + naive          3 M^2 n + 3 M n            S, P H^T L^-T, squares          28 M n   H, P H^T, P H^T L^-T: write
                                                                                         each, read each once or twice

On W ranks the floor is that of one rank divided by the ranks that have a core of their own; bytes between ranks are
not in it. ``peak_bytes`` is the most that a method holds during a step above the head's weights and the batch,
``state_bytes`` what it holds between steps; both are counted in a process of their own. AdamW's two moments are 2 n
floats, and its gradient n more.
"""
