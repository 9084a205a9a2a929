"""
Fit and predict
===============

Four emoji of each of 20 classes, by the classifier with scikit-learn's interface.
"""

from importlib import resources

import pandas

from kngd_ray import KalmanCLIP

emoji = pandas.read_parquet(resources.files("kngd_ray") / "assets" / "emoji.parquet")
noto = emoji[emoji.domain == "noto"]
shots = noto[noto.split == "train"].groupby("class_name").head(4)
test = noto[noto.split == "test"]

classifier = KalmanCLIP().fit(list(shots.image), list(shots.class_name))
probabilities, std = classifier.predict_proba(list(test.image), return_std=True)
print(f"accuracy {classifier.score(list(test.image), list(test.class_name)):.3f}")

# %%
# The least certain of the test pictures:

for row in probabilities.max(axis=1).argsort()[:3]:
    print(test.name.iloc[row], classifier.classes_[probabilities[row].argmax()], f"{probabilities[row].max():.2f}")
