"""
Fit and predict
===============

Four emoji of each of 20 classes, by the classifier with scikit-learn's interface.
"""

from importlib import resources
from io import BytesIO

import pandas
from matplotlib.figure import Figure
from PIL import Image

from kngd_ray import KalmanCLIP

emoji = pandas.read_parquet(resources.files("kngd_ray") / "assets" / "emoji.parquet")
noto = emoji[emoji.domain == "noto"]
shots = noto[noto.split == "train"].groupby("class_name").head(4)
test = noto[noto.split == "test"]

classifier = KalmanCLIP().fit(list(shots.image), list(shots.class_name))
probabilities, std = classifier.predict_proba(list(test.image), return_std=True)
predicted = classifier.classes_[probabilities.argmax(axis=1)]
print(f"accuracy {(predicted == test.class_name).mean():.3f}")

# %%
# The least certain of the test pictures, with the standard deviation that the posterior gives their probability:

figure = Figure(figsize=(6.0, 2.2), layout="constrained")
for axes, row in zip(figure.subplots(1, 3), probabilities.max(axis=1).argsort()[:3], strict=True):
    best = probabilities[row].argmax()
    axes.imshow(Image.open(BytesIO(test.image.iloc[row])))
    axes.set_title(f"{classifier.classes_[best]}\n{probabilities[row, best]:.2f} ± {std[row, best]:.2f}", fontsize=8)
    axes.axis("off")
figure.savefig("least_certain.png")
