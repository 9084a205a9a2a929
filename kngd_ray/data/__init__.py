"""Data sets, few-shot tasks, the cache of frozen features, and pictures for runs that need more than features.

config = DataConfig(path="pacs.parquet", train_domain="photo")
images = open_images(config)                  # labels, domains, splits, hashes; no pictures
split = select(images, config, seed=0)        # support set, in- and out-of-distribution tests
cache = FeatureCache(config.cache_root, model_key, dim)
encode_missing(images, split.indices, cache, encoder)
features = cache.read(images.keys[split.support])
pictures = PictureFile.write("pictures.arrow", images, split.support)    # read at random: pictures.read(0)
"""

from typing import TYPE_CHECKING

from kngd_ray._deferred import on_demand
from kngd_ray.data._config import EMBEDDED, ColumnNames, DataConfig
from kngd_ray.errors import BadImage

if TYPE_CHECKING:
    from kngd_ray.data._cache import FeatureCache
    from kngd_ray.data._crops import Crops
    from kngd_ray.data._decode import SUFFIXES, decode, file_bytes, picture_of
    from kngd_ray.data._encode import (
        EncodedBatch,
        EncodedStream,
        Encoder,
        encode_batch,
        encode_missing,
        fill_cache,
        read_batches,
    )
    from kngd_ray.data._encoded_by import EncodedBy
    from kngd_ray.data._features import FeatureFiles, GivenFeatures, encoder_of, read_features
    from kngd_ray.data._files import data_files
    from kngd_ray.data._given_crops import GivenCrops
    from kngd_ray.data._images import ImageSet, arrange, open_images
    from kngd_ray.data._passed_over import by_suffix, unread
    from kngd_ray.data._pictures import PictureFile, halves, restrict
    from kngd_ray.data._shots import Split, sample_shots, select, select_tests
    from kngd_ray.data._source import content_key
    from kngd_ray.data._walk import of_a_system
    from kngd_ray.data._write import write_features

__all__ = [
    "EMBEDDED",
    "SUFFIXES",
    "BadImage",
    "ColumnNames",
    "Crops",
    "DataConfig",
    "EncodedBatch",
    "EncodedBy",
    "EncodedStream",
    "Encoder",
    "FeatureCache",
    "FeatureFiles",
    "GivenCrops",
    "GivenFeatures",
    "ImageSet",
    "PictureFile",
    "Split",
    "arrange",
    "by_suffix",
    "content_key",
    "data_files",
    "decode",
    "encode_batch",
    "encode_missing",
    "encoder_of",
    "file_bytes",
    "fill_cache",
    "halves",
    "of_a_system",
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

# Imported when they are asked for: they need pyarrow and Pillow, and whoever reads the settings does not.
_HOMES = {
    "Crops": "_crops",
    "EncodedBatch": "_encode",
    "EncodedBy": "_encoded_by",
    "EncodedStream": "_encode",
    "Encoder": "_encode",
    "FeatureCache": "_cache",
    "FeatureFiles": "_features",
    "GivenCrops": "_given_crops",
    "GivenFeatures": "_features",
    "ImageSet": "_images",
    "PictureFile": "_pictures",
    "SUFFIXES": "_decode",
    "Split": "_shots",
    "arrange": "_images",
    "by_suffix": "_passed_over",
    "content_key": "_source",
    "data_files": "_files",
    "decode": "_decode",
    "encode_batch": "_encode",
    "encode_missing": "_encode",
    "encoder_of": "_features",
    "file_bytes": "_decode",
    "fill_cache": "_encode",
    "halves": "_pictures",
    "of_a_system": "_walk",
    "open_images": "_images",
    "picture_of": "_decode",
    "read_batches": "_encode",
    "read_features": "_features",
    "restrict": "_pictures",
    "sample_shots": "_shots",
    "select": "_shots",
    "select_tests": "_shots",
    "unread": "_passed_over",
    "write_features": "_write",
}

__getattr__ = on_demand(__name__, _HOMES)
