"""What a run would cost before anything is run: parameters, memory, time, disk, and whether it fits.

`stage.run_planning` is the whole of it; `shapes` builds the real models without their weights, `passes` runs one
training step of them without numbers, `memory`, `duration` and `disk` add up, `report` says it. Nothing here decides
how a run goes: the plan of a run that is under way is `pipelines.plan`.
"""
