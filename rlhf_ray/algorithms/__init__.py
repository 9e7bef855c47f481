"""The equations of rlhf_ray: torch and shapes only, no configuration, no logging, no workers."""
