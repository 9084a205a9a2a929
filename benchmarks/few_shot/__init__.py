"""Few-shot classification on frozen features: every method on the same shots, with the same budget of search.

    python -m benchmarks.few_shot --data pacs.parquet embedded --shots 1 2 4 8 16 --seeds 10 --trials 60 --report

A *problem* is a data set, the domain that is trained on and a number of shots; a *case* is one support set of it. All
cases of a problem are fitted as one stack of tensors where the method allows (:mod:`~benchmarks.few_shot.stack`).

    data.py      parquet file -> problems           search.py    settings by cross-validated NLL of the shots
    methods/     problem -> predictions, curves     figures.py   predictions -> one row of figures
    store.py     rows and searches that are kept    boot.py      intervals over problems and support sets
    run.py       what is missing is computed        claims.py, report.py, plots.py    what came out

Fairness: a method with settings of its own gets ``--trials`` trials of Optuna's TPE for each data set and number of
shots, the first being the method's usual setting, judged by the NLL that threefold cross-validation gives to the shots
of seed 0, of all domains together (of one shot per class nothing can be held out: there the settings of two are taken).
Kalman's presets are fixed, and choose tau by folds over the shots of each case. Nothing is chosen on test pictures.

``--dev`` is for choosing presets: its test sets are training pictures, those of the trained domain that are not in the
support set and those of the other domains. (In the shipped emoji the same emoji is a training picture in every style,
so that out of distribution --dev is easier there than the test sets are.)
"""
