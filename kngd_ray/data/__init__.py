"""Data sets, few-shot tasks, the cache of frozen features, and pictures for runs that need more than features.

config = DataConfig(path="pacs.parquet", train_domain="photo")
images = open_images(config)                  # labels, domains, splits, hashes; no pictures
split = select(images, config, seed=0)        # support set, in- and out-of-distribution tests
cache = FeatureCache(config.cache_root, model_key, dim)
encode_missing(images, split.indices, cache, encoder)
features = cache.read(images.keys[split.support])
pictures = PictureFile.write("pictures.arrow", images, split.support)    # read at random: pictures.read(0)
"""

from kngd_ray.data._cache import FeatureCache
from kngd_ray.data._config import EMBEDDED, DataConfig
from kngd_ray.data._decode import SUFFIXES, decode, picture_of
from kngd_ray.data._encode import (
    EncodedBatch,
    EncodedStream,
    Encoder,
    encode_batch,
    encode_missing,
    fill_cache,
    read_batches,
)
from kngd_ray.data._features import FeatureFiles, GivenFeatures, read_features
from kngd_ray.data._images import ImageSet, arrange, open_images
from kngd_ray.data._passed_over import by_suffix, unread
from kngd_ray.data._pictures import PictureFile, halves, restrict
from kngd_ray.data._shots import Split, sample_shots, select, select_tests
from kngd_ray.data._source import content_key
from kngd_ray.data._write import write_features
from kngd_ray.errors import BadImage

__all__ = [
    "EMBEDDED",
    "SUFFIXES",
    "BadImage",
    "DataConfig",
    "EncodedBatch",
    "EncodedStream",
    "Encoder",
    "FeatureCache",
    "FeatureFiles",
    "GivenFeatures",
    "ImageSet",
    "PictureFile",
    "Split",
    "arrange",
    "by_suffix",
    "content_key",
    "decode",
    "encode_batch",
    "encode_missing",
    "fill_cache",
    "halves",
    "open_images",
    "picture_of",
    "read_batches",
    "read_features",
    "restrict",
    "sample_shots",
    "select",
    "select_tests",
    "unread",
    "write_features",
]
