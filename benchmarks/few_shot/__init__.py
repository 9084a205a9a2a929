"""Few-shot classification on frozen features: every method on the same shots, with the same budget of search.

    python -m benchmarks.few_shot --data pacs.parquet embedded --report           pictures by the mini CLIP
    python -m benchmarks.few_shot --data pacs.parquet embedded --geometry clip    the same in CLIP's geometry
    python -m benchmarks.few_shot --data own.parquet                              features of one's own
    python -m benchmarks.few_shot --data many many200                             made data of many classes

A *problem* is a data set, the domain that is trained on and a number of shots; a *case* is one support set of it. All
cases of a problem are fitted as one stack of tensors where the method allows (:mod:`~benchmarks.few_shot.stack`).
Problems come in *groups*, each kept, judged and shown by itself (:mod:`~benchmarks.few_shot.groups`).

    data.py        pictures and features -> problems    search.py     settings by cross-validated NLL of the shots
    geometry.py    problems in CLIP's geometry          figures.py    predictions -> one row of figures
    made.py        made data of many classes            boot.py       intervals over problems and support sets
    methods/       problem -> predictions, curves       claims.py     what must hold, and whether it does
    store.py       rows and searches that are kept     report.py, plots.py, tables.py    what came out
    run.py         what is missing is computed

Fairness: a method with settings of its own gets ``--trials`` trials of Optuna's TPE for each data set and number of
shots, the first being the method's usual setting, judged by the NLL that threefold cross-validation gives to the shots
of seed 0, of all domains together (of one shot per class nothing can be held out: there the settings of two are taken).
CLAP and LP++ have settings that are fixed or follow from the shots, as their authors mean them to. Of a thousand
classes a search of AdamW takes hours: there it has fixed settings, the best of six on training pictures of ``many200``.
Kalman's presets are fixed, and choose tau by folds over the shots of each case. Nothing is chosen on test pictures, but
the length of CLAP's prototypes, in its favour.

``--dev`` is for choosing presets: its test sets are training pictures, those of the trained domain that are not in the
support set and those of the other domains. (In the shipped emoji the same emoji is a training picture in every style,
so that out of distribution --dev is easier there than the test sets are.)
"""
