"""Unit tests run on one thread, and check the shapes in the signatures of rlhf_ray.algorithms."""

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook("rlhf_ray.algorithms", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
