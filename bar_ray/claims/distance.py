"""How far training moved the weights that a merge averages."""

from bar_ray import storage
from bar_ray.graph import Step
from bar_ray.recipe import SHARED


def moved(start: Step, model: Step) -> float:
    """Distance between the shared weights of two models, in percent of the first ones' norm."""
    from bar_ray.model import tensors

    one, other = (tensors.Checkpoint(storage.fetch(s.artifact.uri)) for s in (start, model))
    shared = [name for name in one.names if tensors.role_of(name) in SHARED]
    apart = sum((one[name] - other[name]).double().square().sum().item() for name in shared)
    norm = sum(one[name].double().square().sum().item() for name in shared)
    return 100 * (apart / norm) ** 0.5
