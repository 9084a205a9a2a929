"""``kngd-ray doctor``: what this machine, its cluster, storage and tracking store can do."""
