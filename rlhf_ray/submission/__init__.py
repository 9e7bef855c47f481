"""A pipeline on its way to a cluster: what travels, and how it is written for Ray, Kubernetes and Slurm."""
