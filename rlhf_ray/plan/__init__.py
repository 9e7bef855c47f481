"""What can be known of a pipeline before anything is started."""

from rlhf_ray.plan.data import check_data

__all__ = ["check_data"]
