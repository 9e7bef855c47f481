"""Reward functions that the wrong pipeline files name."""


def length(prompts: list[str], responses: list[str], answers: list[str | None]) -> list[float]:
    return [float(len(response)) for response in responses]
