"""What the parts of a data set are called."""

# In small letters; of several names the first one that is there is taken.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test", "dev", "eval"),
}
# Names that mean the same.
ALIKE = (SPLIT_NAMES["train"], ("val", "valid", "validation"))
KNOWN_SPLITS = tuple(name for names in SPLIT_NAMES.values() for name in names)
