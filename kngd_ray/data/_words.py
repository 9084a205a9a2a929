"""What words in the names of folders and files mean, in small letters."""

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

_BESIDE = """
image images img imgs picture pictures pic pics photo photos file files sample samples data dataset set split part of
the full jpg jpeg png folder
"""
BESIDE_SPLITS = frozenset(_BESIDE.split())
"""Words that add nothing to the name of a split."""

JOINED = {f"{word}{more}": split for word, split in SPLIT_WORDS.items() for more in ("set", "data", "images", "imgs")}
"""Words for splits that are written together with such a word."""

_ORIGINS = """
photo photos photograph photographs photography sketch sketches cartoon cartoons art arts artpainting artwork painting
paintings drawing drawings clipart infograph infographic quickdraw real world realworld product products synthetic syn
sim simulated simulation simulator render rendered renders renderings generated natural web webcam dslr amazon caltech
labelme sun voc pascal mnist mnistm svhn usps imagenet coco comic comics anime watercolor watercolour graffiti
sculpture embroidery rgb infrared ir nir thermal noto twemoji openmoji fluent emoji domain source target style site
hospital clinic center centre location loc city country lab field studio indoor indoors outdoor outdoors scanner
camera cam sensor device phone
"""
ORIGINS = frozenset(_ORIGINS.split())
"""How pictures came about, or where they are from: words for domains."""

_ASPECTS = """
day night morning noon evening dawn dusk spring summer autumn fall winter year month week date january february march
april may june july august september october november december jan feb mar apr jun jul aug sep sept oct nov dec monday
tuesday wednesday thursday friday saturday sunday sunny rainy rain snow snowy fog foggy cloudy
left right front back rear top bottom side up down upper lower inner outer middle near far north south east west
raw original originals clean noisy corrupted augmented augmentation aug cropped crop crops resized small medium large hd
images image img imgs pictures pics files data grey gray color colour black white flat
view views angle pose batch session set part group folder fold run take trial video clip seq sequence frame frames scene
subject person patient participant user id no misc other others unsorted new old low high
"""
ASPECTS = frozenset(_ASPECTS.split())
"""When and from which side pictures were taken, or which part of a collection they are: hardly classes."""
